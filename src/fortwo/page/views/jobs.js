/** Jobs: the queue in its order, and the others, of which up to five can be compared. */
import {post} from '../api.js';
import {ACTIVE} from '../job_events.js';
import {Empty, Loading, Problem, Status, html, moment, useAction, useData, useEffect, useState} from '../parts.js';
import {text} from '../text.js';
import {MOST_RUNS} from './runs.js';

const PAGE = 20;
const LIST_MS = 3000;

export function Jobs() {
  const [limit, setLimit] = useState(PAGE);
  const [active, setActive] = useState(true);
  const [chosen, setChosen] = useState(/** @type {string[]} */ ([]));
  const {data, error, reload} = useData(`/api/training/jobs?limit=${limit}`, active ? LIST_MS : 0);
  const action = useAction();
  const jobs = data?.jobs;
  useEffect(() => {
    if (jobs) setActive(jobs.some((job) => ACTIVE.includes(job.status)));
  }, [jobs]);
  const first = (job) =>
    action.run(async () => {
      await post(`/api/training/jobs/${job.job_id}/run-next`);
      reload();
    });
  const choose = (id, on) => setChosen(on ? [...chosen, id] : chosen.filter((one) => one !== id));
  const queued = (jobs ?? []).filter((job) => job.queue_position !== null).sort((one, other) => one.queue_position - other.queue_position);
  const item = (job) => html`
    <li key=${job.job_id} class="choice">
      <input type="checkbox" aria-label=${text.jobs.choose(job.adapter_name, moment(job.created_at))} checked=${chosen.includes(job.job_id)}
        disabled=${chosen.length === MOST_RUNS && !chosen.includes(job.job_id)} onChange=${(event) => choose(job.job_id, event.target.checked)} />
      <a class="card item" href=${`#/job/${job.job_id}`}>
        <span class="grow"><strong>${job.adapter_name}</strong> <span class="muted">${text.job.on(job.model)}</span></span>
        <span class="muted">${moment(job.created_at)}</span>
        ${job.queue_position !== null && html`<span class="muted">${text.jobs.place(job.queue_position)}</span>`}
        ${ACTIVE.includes(job.status) && job.queue_position === null && html`
          <span class="muted">${text.jobs.step(job.progress.step, job.progress.steps)}</span>`}
        <${Status} of=${job.status} />
      </a>
      ${job.queue_position > 1 && html`
        <button type="button" class="small" disabled=${action.busy} onClick=${() => first(job)}>
          ${text.jobs.runNext}<span class="hidden"> ${job.adapter_name}</span>
        </button>`}
    </li>
  `;
  return html`
    <h1>${text.jobs.title}</h1>
    <${Problem} error=${error ?? action.error} />
    ${!data && !error && html`<${Loading} />`}
    ${jobs?.length === 0 && html`<${Empty} href="#/teach" next=${text.jobs.emptyNext}>${text.jobs.empty}<//>`}
    ${jobs?.length > 1 && html`
      <div class="row">
        <span class="muted grow">${text.jobs.compareHelp(MOST_RUNS)}</span>
        ${chosen.length > 1
          ? html`<a class="button" href=${`#/runs/${chosen.join(',')}`}>${text.jobs.compare(chosen.length)}</a>`
          : html`<button type="button" disabled>${text.jobs.compare(chosen.length)}</button>`}
      </div>
    `}
    ${queued.length > 0 && html`
      <h2>${text.jobs.queue}</h2>
      <ol class="list queue">${queued.map(item)}</ol>
    `}
    <ul class="list">${jobs?.filter((job) => job.queue_position === null).map(item)}</ul>
    ${jobs?.length === limit && html`<button type="button" onClick=${() => setLimit(limit + PAGE)}>${text.jobs.more}</button>`}
  `;
}
