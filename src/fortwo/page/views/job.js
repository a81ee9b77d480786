/** One job: all that is shown comes from GET job and its event stream, so that any tab shows the same. */
import {get, post} from '../api.js';
import {teachAgain} from '../draft.js';
import {ACTIVE, AT_REST, told, useJob} from '../job_events.js';
import {
  Confirm, Loading, Problem, Settings, Status, Warnings, clock, duration, html, number, shown, size, useAction, useNow, useState,
} from '../parts.js';
import {Report} from '../report.js';
import {text} from '../text.js';
import {Evaluations, Loss, Rate, Samples} from './curves.js';

const PHASES = ['queued', 'preparing', 'running', 'evaluating'];

export function Job({id}) {
  const {job, events, error, again} = useJob(id);
  if (!job) return error ? html`<h1>${text.nav.jobs}</h1><${Problem} error=${error} />` : html`<${Loading} />`;
  const {status, steps, evaluations, others} = told(job, events);
  const ended = AT_REST.includes(status);
  return html`
    <p class="crumb"><a href="#/jobs">${text.job.back}</a></p>
    <div class="heading">
      <h1>${text.job.title(job.adapter_name)}</h1>
      <span class="muted">${text.job.on(job.model)}</span>
      <${Status} of=${status} />
    </div>
    <${Problem} error=${error} />
    ${ended && job.status === status && html`<${Verdict} job=${job} />`}
    ${!ended && html`<${Progress} ...${{job, status, steps, others}} />`}
    <${Actions} ...${{job, status, again}} />
    ${job.report && html`
      <section class="card">
        <h2>${text.report.title}</h2>
        <${Report} report=${job.status === 'failed' ? {...job.report, diagnosis: []} : job.report} targets=${job.plan.targets} />
      </section>
    `}
    ${(steps.length > 0 || evaluations.length > 0) && html`
      <div class="halves">
        <${Loss} ...${{steps, evaluations, others}} />
        ${evaluations.some((one) => Object.keys(one.metrics).length > 0) && html`
          <${Evaluations} ...${{evaluations, targets: job.plan.targets, ended: Boolean(job.report)}} />
        `}
      </div>
    `}
    ${steps.length > 1 && html`<${Rate} steps=${steps} />`}
    <${Samples} evaluations=${evaluations} />
    ${job.checkpoints.length > 0 && html`
      <section class="card">
        <h2>${text.job.checkpoints}</h2>
        <p class="row">
          ${job.checkpoints.map(
            (one) => html`<a key=${one.step} class="button" href=${chat(one.model)}>${text.job.tryCheckpoint(one.step)}</a>`,
          )}
        </p>
      </section>
    `}
    <section class="card">
      <h2>${text.job.events}</h2>
      <ol class="events">
        ${others.map(
          (event) => html`
            <li key=${event.id} class=${event.level}><time class="muted">${clock(event.created_at)}</time> ${event.message}</li>
          `,
        )}
      </ol>
    </section>
    <section class="card">
      <h2>${text.job.plan}</h2>
      <${Warnings} of=${job.plan.warnings} />
      <${Settings} plan=${job.plan} />
      ${job.actual && html`<${Against} plan=${job.plan.computed} actual=${job.actual} />`}
    </section>
  `;
}

const chat = (...models) => `#/chat?models=${models.map(encodeURIComponent).join(',')}`;

function Verdict({job}) {
  const {verdict} = text.job;
  const action = useAction();
  const again = () =>
    action.run(async () => {
      if (job.status === 'failed') {
        const {request, changes} = await get(`/api/training/jobs/${job.job_id}/next-try`);
        teachAgain(request, changes);
      } else {
        teachAgain(await get(`/api/training/jobs/${job.job_id}/request`));
      }
    });
  const diagnosis = job.status === 'failed' ? job.report?.diagnosis : [];
  const made = job.adapter && `${job.adapter.name}@${job.adapter.version}`;
  const goal = Object.keys(job.plan.targets).length > 0;
  const [title, about] = {
    succeeded: goal ? [verdict.learned, verdict.learnedText(made)] : [verdict.trained, verdict.trainedText(made)],
    failed: made ? [verdict.missed, verdict.missedText(made)] : [verdict.failed, null],
    cancelled: [verdict.cancelled, verdict.cancelledText],
    paused: [verdict.paused, verdict.pausedText],
  }[job.status];
  return html`
    <section class=${`card verdict ${job.status}`} aria-labelledby="verdict">
      <h2 id="verdict">${title}</h2>
      ${about && html`<p>${about}</p>`}
      <${Warnings} of=${diagnosis} />
      ${job.error && html`<p>${job.error.message}</p>${job.error.hint && html`<p class="muted">${job.error.hint}</p>`}`}
      <div class="row">
        ${made && html`
          <a class="button primary" href=${chat(job.model, made)}>${text.job.compare}</a>
          <a class="button" href=${`#/adapters/${job.adapter.name}`}>${text.job.toAdapter}</a>
        `}
        ${job.status !== 'paused' && html`
          <button type="button" class=${job.status === 'failed' ? 'primary' : ''} disabled=${action.busy} onClick=${again}>
            ${job.status === 'failed' ? text.job.nextTry : text.job.again}
          </button>`}
      </div>
      <${Problem} error=${action.error} />
    </section>
  `;
}

function Progress({job, status, steps, others}) {
  const now = useNow(true);
  const {computed} = job.plan;
  const last = steps.at(-1);
  const step = last?.step ?? job.progress.step;
  const total = last?.steps ?? job.progress.steps;
  const elapsed = job.started_at ? now - job.started_at : 0;
  const left = remaining(computed, status, steps, elapsed, total);
  return html`
    <section class="card" aria-label=${text.job.phases}>
      <ol class="phases">
        ${PHASES.map(
          (phase) => html`
            <li key=${phase} class=${PHASES.indexOf(phase) < PHASES.indexOf(status) ? 'done' : ''}
              aria-current=${phase === status ? 'step' : undefined}>${text.status[phase]}</li>
          `,
        )}
      </ol>
      <progress max=${total} value=${step} aria-label=${text.jobs.step(step, total)}></progress>
      <dl class="tiles">
        <div><dt>${text.job.step}</dt><dd>${number(step)} / ${number(total)}</dd></div>
        <div><dt>${text.job.elapsed}</dt><dd>${duration(elapsed)}</dd></div>
        <div><dt>${text.job.left}</dt><dd>${duration(left)}</dd></div>
        <div><dt>${text.job.loss}</dt><dd>${last ? number(last.loss, 3) : text.none}</dd></div>
        <div><dt>${text.job.speed}</dt><dd>${last ? number(last.tokens_per_second, 3) : text.none}</dd></div>
      </dl>
      ${status === 'queued' && job.queue_position && html`<p>${text.jobs.place(job.queue_position)}</p>`}
      ${others.length > 0 && html`<p class="muted" role="status" aria-live="polite">${others.at(-1).message}</p>`}
    </section>
  `;
}

/** Seconds until the end: what the steps so far took, for those to come, and as planned for the rest. */
function remaining(computed, status, steps, elapsed, total) {
  const rest = computed.report_seconds ?? 0;
  if (status === 'queued') return computed.seconds;
  if (status === 'evaluating') return rest || null;
  if (steps.length < 2) return Math.max(computed.seconds - elapsed, rest);
  const took = steps.reduce((sum, one) => sum + one.seconds, 0) / steps.length;
  const shareLeft = (total - steps.at(-1).step) / total;
  return took * (total - steps.at(-1).step) + (computed.exam_seconds ?? 0) * shareLeft + rest;
}

function Actions({job, status, again}) {
  const action = useAction();
  const [asking, setAsking] = useState(false);
  const act = (what) =>
    action.run(async () => {
      await post(`/api/training/jobs/${job.job_id}/${what}`);
      again();
    });
  const may = {
    pause: ACTIVE.includes(status),
    resume: ['paused', 'failed', 'cancelled'].includes(status) && job.error?.code !== 'targets_missed',
    cancel: ACTIVE.includes(status) || status === 'paused',
  };
  const keeping = may.pause && {label: text.job.cancelPause, run: () => act('pause')};
  return html`
    <div class="row actions">
      ${may.pause && html`<button type="button" disabled=${action.busy} onClick=${() => act('pause')}>${text.job.pause}</button>`}
      ${may.resume && html`<button type="button" disabled=${action.busy} onClick=${() => act('resume')}>${text.job.resume}</button>`}
      ${may.cancel && html`
        <button type="button" class="danger quiet" disabled=${action.busy} onClick=${() => setAsking(true)}>${text.job.cancel}</button>
      `}
    </div>
    <${Problem} error=${action.error} />
    ${asking && html`
      <${Confirm} title=${text.job.cancelTitle} confirm=${text.job.cancelConfirm} keep=${text.job.cancelKeep}
        other=${keeping}
        onConfirm=${() => act('cancel')} onClose=${() => setAsking(false)}>${text.job.cancelText}<//>
    `}
  `;
}

function Against({plan, actual}) {
  const names = [...Object.keys(plan), ...Object.keys(actual).filter((name) => !(name in plan))];
  const figure = (name, value) =>
    name.endsWith('bytes') ? size(value) : name === 'seconds' || name.endsWith('_seconds') ? duration(value) : shown(value);
  return html`
    <details>
      <summary>${text.job.planAgainst}</summary>
      <div class="scroll" tabindex="0" role="region" aria-label=${text.job.planAgainst}>
        <table>
          <thead>
            <tr>
              <th scope="col"><span class="hidden">${text.plan.setting}</span></th>
              <th scope="col" class="figure">${text.job.planned}</th>
              <th scope="col" class="figure">${text.job.actual}</th>
            </tr>
          </thead>
          <tbody>
            ${names.map(
              (name) => html`
                <tr key=${name}>
                  <th scope="row"><code>${name}</code></th>
                  <td class="figure">${figure(name, plan[name])}</td>
                  <td class="figure">${figure(name, actual[name])}</td>
                </tr>
              `,
            )}
          </tbody>
        </table>
      </div>
    </details>
  `;
}
