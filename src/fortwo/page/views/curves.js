/** What a job's events say, as curves: the loss, the shares of its evaluations, and the replies that change. */
import {Chart} from '../chart.js';
import {ShareBar, html, number, share} from '../parts.js';
import {METRICS, metricName} from '../report.js';
import {text} from '../text.js';

/** A running mean of the losses at these steps, null before the first. of: the loss of each step. */
export function smoothed(at, of) {
  let mean = null;
  return at.map((step) => {
    const loss = of.get(step);
    if (loss === undefined || loss === null) return mean;
    mean = mean === null ? loss : 0.8 * mean + 0.2 * loss;
    return mean;
  });
}

const MARKED = ['checkpoint', 'paused', 'queued', 'running'];

/** Events that happened between steps, as marks of a curve: {step, label}. */
export function marksOf(others) {
  const found = others.filter((event) => event.step > 0 && MARKED.includes(event.type));
  return found.map((event) => ({step: event.step, label: event.message}));
}

export function Loss({steps, evaluations, others}) {
  const held = new Map(evaluations.filter((one) => one.eval_loss !== null).map((one) => [one.step, one.eval_loss]));
  const at = [...new Set([...steps.map((one) => one.step), ...held.keys()])].sort((one, other) => one - other);
  const of = new Map(steps.map((one) => [one.step, one.loss]));
  const smooth = smoothed(at, of);
  const values = [
    {label: text.job.lossRaw, color: 'faint', width: 1},
    {label: text.job.lossSmooth, color: 'accent', points: at.length < 3},
  ];
  const data = [at, at.map((step) => of.get(step) ?? null), smooth];
  if (held.size) {
    values.push({label: text.job.lossEval, color: 'second', points: true});
    data.push(at.map((step) => held.get(step) ?? null));
  }
  const known = steps.filter((one) => one.loss !== null);
  const summary = known.length
    ? text.job.lossSummary(steps.length, number(known[0].loss, 3), number(known.at(-1).loss, 3))
    : text.job.lossCurve;
  return html`
    <section class="card">
      <h2>${text.job.lossCurve}</h2>
      <${Chart} data=${data} series=${{x: text.job.step, values}} summary=${summary} marks=${marksOf(others)} />
    </section>
  `;
}

const COLORS = ['accent', 'second', 'third', 'fourth'];

/** The newest shares against their targets and, while there is no report, how they came about. */
export function Evaluations({evaluations, targets, ended}) {
  const names = METRICS.filter((name) => evaluations.some((one) => name in one.metrics));
  const newest = evaluations.at(-1);
  const drawn = names.filter((name) => name in targets).slice(0, COLORS.length);
  const at = evaluations.map((one) => one.step);
  /** @type {object[]} */
  const values = drawn.map((name, place) => ({label: metricName(name), color: COLORS[place], points: true}));
  const data = [at, ...drawn.map((name) => evaluations.map((one) => one.metrics[name] ?? null))];
  const lines = [...new Set(drawn.map((name) => targets[name]))];
  for (const line of lines) {
    values.push({label: text.job.target(share(line)), color: 'muted', width: 1, dash: [4, 4]});
    data.push(at.map(() => line));
  }
  return html`
    <section class="card">
      <h2>${text.job.evaluations} <small class="muted">${text.job.afterStep(newest.step)}</small></h2>
      ${!ended && html`
        <ul class="shares">
          ${names.map(
            (name) => html`
              <li key=${name}>
                <span>${metricName(name)}</span>
                <${ShareBar} value=${newest.metrics[name] ?? 0} target=${targets[name]} />
                <strong class=${targets[name] === undefined ? '' : newest.metrics[name] >= targets[name] ? 'good' : 'bad'}>
                  ${share(newest.metrics[name])}
                </strong>
                <span class="muted">${targets[name] === undefined ? '' : text.job.target(share(targets[name]))}</span>
              </li>
            `,
          )}
        </ul>
      `}
      ${(ended || at.length > 1) && drawn.length > 0 && html`
        <${Chart} data=${data} series=${{x: text.job.step, values}} range=${[0, 1.05]}
          summary=${text.job.evaluationSummary(evaluations.length)} />
      `}
    </section>
  `;
}

/** The rate and the norm of the gradient of each step. */
export function Rate({steps}) {
  const at = steps.map((one) => one.step);
  const values = [{label: text.job.rate, color: 'accent'}];
  const data = [at, steps.map((one) => one.learning_rate)];
  return html`
    <details class="card">
      <summary>${text.job.rate}</summary>
      <${Chart} data=${data} series=${{x: text.job.step, values}} summary=${text.job.rate} height=${160} />
    </details>
  `;
}

/** The replies to the same questions, evaluation by evaluation; one that is the same as before is not repeated. */
export function Samples({evaluations}) {
  const told = new Map();
  for (const {step, samples} of evaluations) {
    for (const one of samples ?? []) {
      const key = `${one.kind} ${one.prompt}`;
      const before = told.get(key) ?? {kind: one.kind, prompt: one.prompt, replies: []};
      const last = before.replies.at(-1);
      if (last?.reply !== one.reply) before.replies.push({step, reply: one.reply, passed: one.passed});
      told.set(key, before);
    }
  }
  if (!told.size) return null;
  return html`
    <section class="card samples">
      <h2>${text.job.samples}</h2>
      <p class="help">${text.job.samplesHelp}</p>
      <ol class="said">
        ${[...told].map(([key, {kind, prompt, replies}]) => html`
          <li key=${key}>
            <p class="asked"><span class="muted">${metricName(kind)}</span><strong>${prompt}</strong></p>
            <ol>
              ${replies.slice(-3).reverse().map((one) => html`
                <li key=${one.step} class="sample">
                  <span class="muted">${text.job.afterStep(one.step)}</span>${' '}
                  <span class=${one.passed ? 'good' : 'bad'}>${one.passed ? text.report.passed : text.report.failed}</span>${' '}
                  <span>${one.reply || text.report.nothing}</span>
                </li>`)}
            </ol>
          </li>`)}
      </ol>
    </section>
  `;
}
