/** What an evaluation found: metrics of the base against the adapter, fact by fact, and transcripts. */
import {ShareBar, Warnings, html, number, share, useState} from './parts.js';
import {text} from './text.js';

const FACT_METRICS = ['efficacy', 'paraphrase', 'specificity', 'portability'];
const FEW = 8; // transcripts that are shown at first
export const METRICS = [...FACT_METRICS, 'accuracy', 'retention', ...FACT_METRICS.map((name) => `kept_${name}`), 'score'];

export const metricName = (name) => text.report.metrics[name]?.[0] ?? name;

/** report as in GET /api/adapters/NAME/report; targets: the plan's. */
export function Report({report, targets}) {
  return html`
    <${Metrics} report=${report} targets=${targets} />
    ${report.diagnosis.length > 0 && html`
      <h3>${text.report.diagnosis}</h3>
      <${Warnings} of=${report.diagnosis} />
    `}
    <${Facts} facts=${report.facts ?? []} />
    <${EvalLosses} losses=${report.eval_losses ?? []} />
    <${Transcripts} of=${report.transcripts} />
  `;
}

function Metrics({report, targets}) {
  const names = METRICS.filter((name) => name in report.metrics);
  const prompted = Object.keys(report.prompted_metrics ?? {}).length > 0 && report.prompted_metrics;
  if (!names.length) return null;
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label=${text.report.title}>
      <table class="metrics">
        <thead>
          <tr>
            <th scope="col">${text.report.metric}</th>
            <th scope="col" class="figure">${text.report.base}</th>
            ${prompted && html`<th scope="col" class="figure">${text.report.prompted}</th>`}
            <th scope="col" class="figure">${text.report.adapter}</th>
            <th scope="col" class="wide"><span class="hidden">${text.report.interval}</span></th>
            <th scope="col" class="figure">${text.report.interval}</th>
            <th scope="col" class="figure">${text.report.target}</th>
            <th scope="col" class="figure">${text.report.count}</th>
          </tr>
        </thead>
        <tbody>
          ${names.map((name) => {
            const found = report.metrics[name];
            const base = report.base_metrics[name];
            const target = targets?.[name];
            const [title, about] = text.report.metrics[name] ?? [name, ''];
            return html`
              <tr key=${name} class=${name}>
                <th scope="row">${title}<small>${about}</small></th>
                <td class="figure">${share(base?.value)}</td>
                ${prompted && html`<td class="figure">${share(prompted[name]?.value)}</td>`}
                <td class="figure"><strong>${share(found.value)}</strong></td>
                <td class="wide"><${ShareBar} ...${found} target=${target} base=${base?.value} /></td>
                <td class="figure">${share(found.low)} – ${share(found.high)}</td>
                <td class="figure">
                  ${target === undefined
                    ? text.none
                    : html`${share(target)} <span class=${found.value >= target ? 'good' : 'bad'}>
                        ${found.value >= target ? text.report.met : text.report.missed}</span>`}
                </td>
                <td class="figure">${found.n}</td>
              </tr>
            `;
          })}
        </tbody>
      </table>
    </div>
    <p class="help">${text.report.legend}</p>
  `;
}

function Facts({facts}) {
  if (facts.length < 2) return null;
  const names = FACT_METRICS.filter((name) => facts.some((fact) => name in fact.metrics));
  return html`
    <h3>${text.report.facts}</h3>
    <div class="scroll" tabindex="0" role="region" aria-label=${text.report.facts}>
      <table>
        <thead>
          <tr>
            <th scope="col">${text.report.fact}</th>
            ${names.map((name) => html`<th scope="col" class="figure" key=${name}>${metricName(name)}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${facts.map(
            (fact) => html`
              <tr key=${fact.subject}>
                <th scope="row">${fact.subject} ${fact.kept && html`<span class="chip">${text.report.kept}</span>`}</th>
                ${names.map((name) => html`<td class="figure" key=${name}>${share(fact.metrics[name]?.value)}</td>`)}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
  `;
}

function EvalLosses({losses}) {
  if (!losses.length) return null;
  return html`
    <h3>${text.report.evalLosses}</h3>
    <p>${losses.map((one) => `${number(one.loss)} ${text.job.afterStep(one.step)}`).join(', ')}</p>
  `;
}

function Transcripts({of}) {
  const [onlyFailed, setOnlyFailed] = useState(false);
  const [all, setAll] = useState(false);
  if (!of.length) return null;
  const listed = onlyFailed ? of.filter((one) => !one.passed) : of;
  return html`
    <details class="transcripts">
      <summary>${text.report.transcripts(of.length)}</summary>
      <label class="check">
        <input type="checkbox" checked=${onlyFailed} onChange=${(event) => setOnlyFailed(event.target.checked)} />
        ${text.report.onlyFailed}
      </label>
      ${listed.length === 0 && html`<p class="muted">${text.report.noFailed}</p>`}
      <ol class="said">
        ${listed.slice(0, all ? undefined : FEW).map(
          (one, place) => html`
            <li key=${place}>
              <p class="asked">
                <span class=${one.passed ? 'good' : 'bad'}>${one.passed ? text.report.passed : text.report.failed}</span>
                <span class="muted">${metricName(one.kind)}</span>
                <strong>${one.prompt}</strong>
              </p>
              <dl>
                <div><dt>${text.report.baseSaid}</dt><dd>${one.base || text.report.nothing}</dd></div>
                <div><dt>${text.report.adapterSaid}</dt><dd>${one.adapter || text.report.nothing}</dd></div>
              </dl>
            </li>
          `,
        )}
      </ol>
      ${!all && listed.length > FEW && html`
        <button type="button" class="small" onClick=${() => setAll(true)}>${text.report.all(listed.length)}</button>
      `}
    </details>
  `;
}
