/** Up to five runs over each other: their losses, their results, and the settings in which they differ. */
import {Chart} from '../chart.js';
import {told, useJob} from '../job_events.js';
import {Loading, Name, Problem, Status, duration, html, share, shown, useState} from '../parts.js';
import {METRICS, metricName} from '../report.js';
import {text} from '../text.js';
import {Table} from './comparison.js';
import {smoothed} from './curves.js';

export const MOST_RUNS = 5;
const COLORS = ['accent', 'second', 'third', 'fourth', 'fifth'];
const OWN = ['adapter_name']; // of every run its own

/** id: the ids of the jobs, separated by commas. */
export function Runs({id}) {
  const ids = id.split(',').filter(Boolean).slice(0, MOST_RUNS);
  const runs = ids.map((one) => useJob(one)); // as many each time: another list of ids is another view
  const error = runs.find((run) => run.error)?.error;
  const there = runs.filter((run) => run.job);
  return html`
    <p class="crumb"><a href="#/jobs">${text.job.back}</a></p>
    <h1>${text.runs.title(ids.length)}</h1>
    <${Problem} error=${error} />
    ${there.length < ids.length && !error ? html`<${Loading} />` : html`<${Compared} runs=${there} />`}
  `;
}

function Compared({runs}) {
  const [all, setAll] = useState(false);
  const names = runs.map(({job}, place) => `${place + 1}: ${job.adapter_name}`);
  const results = METRICS.filter((name) => runs.some(({job}) => job.report && name in job.report.metrics));
  const metric = (job, name) => share(job.report?.metrics[name]?.value);
  return html`
    <ul class="runs">
      ${runs.map(({job}, place) => html`
        <li key=${job.job_id}><span class=${`key ${COLORS[place]}`}></span> <a href=${`#/job/${job.job_id}`}>${names[place]}</a> <${Status} of=${job.status} /></li>`)}
    </ul>
    <${Losses} runs=${runs} names=${names} />
    <section class="card">
      <h2>${text.runs.results}</h2>
      <${Table} title=${text.report.metric} head=${names} figures rows=${[
        ...results.map((name) => [metricName(name), ...runs.map(({job}) => metric(job, name))]),
        [text.job.step, ...runs.map(({job}) => shown(job.progress.step))],
        [text.runs.took, ...runs.map(({job}) => duration(job.actual?.training_seconds))],
        [text.runs.finalLoss, ...runs.map(({job}) => shown(job.actual?.final_loss ?? null))],
      ]} />
    </section>
    <section class="card">
      <div class="heading">
        <h2 class="grow">${text.runs.settings}</h2>
        <label class="check">
          <input type="checkbox" checked=${!all} onChange=${(event) => setAll(!event.target.checked)} /> ${text.runs.onlyDifferences}
        </label>
      </div>
      <${Differences} runs=${runs} names=${names} all=${all} />
    </section>
  `;
}

/** [name, ...values] of every setting of any plan; only where they differ, unless all are wanted. */
export function differing(plans, all) {
  const values = plans.map((plan) => new Map([['model', plan.model], ['objective', plan.objective], ...plan.settings.map((one) => [one.name, one.value])]));
  const names = [...new Set(values.flatMap((one) => [...one.keys()]))].filter((name) => !OWN.includes(name));
  const rows = names.map((name) => [name, ...values.map((one) => (one.has(name) ? shown(one.get(name)) : text.none))]);
  return all ? rows : rows.filter(([, first, ...others]) => others.some((one) => one !== first));
}

function Differences({runs, names, all}) {
  const rows = differing(runs.map(({job}) => job.plan), all);
  if (!rows.length) return html`<p class="muted">${text.runs.same}</p>`;
  const named = rows.map(([name, ...values]) => [html`<${Name} of=${name} />`, ...values]);
  return html`<${Table} title=${text.plan.setting} head=${names} rows=${named} />`;
}

function Losses({runs, names}) {
  const curves = runs.map(({job, events}) => {
    const {steps} = told(job, events);
    const at = steps.map((one) => one.step);
    return new Map(smoothed(at, new Map(steps.map((one) => [one.step, one.loss]))).map((loss, place) => [at[place], loss]));
  });
  const at = [...new Set(curves.flatMap((curve) => [...curve.keys()]))].sort((one, other) => one - other);
  const values = names.map((label, place) => ({label, color: COLORS[place]}));
  const data = [at, ...curves.map((curve) => at.map((step) => curve.get(step) ?? null))];
  return html`
    <section class="card">
      <h2>${text.job.lossCurve} <small class="muted">${text.job.lossSmooth}</small></h2>
      <${Chart} data=${data} series=${{x: text.job.step, values}} summary=${text.runs.summary(names.join(', '))} height=${280} />
    </section>
  `;
}
