/** Two versions beside each other: metrics, settings that differ, replies that changed, and how far apart they are. */
import {get} from '../api.js';
import {Name, Problem, html, number, share, shown, useAction, useState} from '../parts.js';
import {metricName} from '../report.js';
import {text} from '../text.js';

const refOf = (one) => `${one.name}@${one.version}`;

/** versions: of the adapter `name`, oldest first; all: of all adapters. */
export function Comparison({name, versions, all}) {
  const newest = refOf(versions.at(-1));
  const others = all.map(refOf);
  const [left, setLeft] = useState(others.filter((one) => one !== newest && one.startsWith(`${name}@`)).at(-1) ?? others.find((one) => one !== newest));
  const [right, setRight] = useState(newest);
  const [found, setFound] = useState(null);
  const action = useAction();
  const pick = (id, label, value, change) => html`
    <label for=${id}>${label}</label>
    <select id=${id} value=${value} onChange=${(event) => change(event.target.value)}>
      ${others.map((one) => html`<option key=${one} value=${one}>${one}</option>`)}
    </select>
  `;
  const compare = (event) => {
    event.preventDefault();
    action.run(async () => setFound(await get(`/api/adapters/${left}/compare?other=${encodeURIComponent(right)}`)));
  };
  return html`
    <details class="comparison">
      <summary>${text.compare.title}</summary>
      <form class="row" onSubmit=${compare}>
        ${pick(`left-${name}`, text.compare.left, left, setLeft)}
        ${pick(`right-${name}`, text.compare.right, right, setRight)}
        <button disabled=${action.busy || left === right}>${text.compare.submit}</button>
        <a class="button" href=${`#/chat?models=${encodeURIComponent(left)},${encodeURIComponent(right)}`}>${text.compare.chat}</a>
      </form>
      <${Problem} error=${action.error} />
      ${found && html`<${Found} found=${found} />`}
    </details>
  `;
}

function Found({found}) {
  const {left, right, weights} = found;
  const settings = found.settings.map((one) => [html`<${Name} of=${one.name} />`, shown(one.left), shown(one.right)]);
  return html`
    <${Table} title=${text.report.metric} head=${[left, right, text.compare.difference]} figures
      rows=${Object.entries(found.metrics).map(([name, one]) => [metricName(name), share(one.left), share(one.right), signed(one.difference)])} />
    <h3>${text.compare.settings(found.settings.length)}</h3>
    ${found.settings.length > 0 && html`
      <${Table} title=${text.plan.setting} head=${[left, right]} rows=${settings} />`}
    <h3>${text.compare.probes(found.probes.length)}</h3>
    <ol class="said">
      ${found.probes.map((one, place) => html`
        <li key=${place}>
          <p class="asked"><span class="muted">${metricName(one.kind)}</span><strong>${one.prompt}</strong></p>
          <dl>
            <div><dt>${left} <span class=${one.passed ? 'bad' : 'good'}>${one.passed ? text.report.failed : text.report.passed}</span></dt><dd>${one.left}</dd></div>
            <div><dt>${right} <span class=${one.passed ? 'good' : 'bad'}>${one.passed ? text.report.passed : text.report.failed}</span></dt><dd>${one.right}</dd></div>
          </dl>
        </li>`)}
    </ol>
    ${weights === null
      ? html`<p class="muted">${text.compare.otherBase}</p>`
      : html`<p class="muted">${text.compare.weights(weights.relative === null ? text.none : number(weights.relative, 3), weights.cosine === null ? text.none : number(weights.cosine, 3))}</p>`}
  `;
}

const signed = (value) => (value === null ? text.none : `${value > 0 ? '+' : ''}${share(value)}`);

/** rows: lists of cells, of which the first is the row's heading. figures: whether the others are numbers. */
export function Table({title, head, rows, figures}) {
  const kind = figures ? 'figure' : '';
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label=${title}>
      <table>
        <thead><tr><th scope="col">${title}</th>${head.map((one) => html`<th scope="col" class=${kind} key=${one}>${one}</th>`)}</tr></thead>
        <tbody>
          ${rows.map(([first, ...others], row) => html`
            <tr key=${row}><th scope="row">${first}</th>${others.map((one, place) => html`<td class=${kind} key=${place}>${one}</td>`)}</tr>`)}
        </tbody>
      </table>
    </div>
  `;
}
