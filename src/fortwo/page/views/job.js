/** Jobs, and one job: all that is shown comes from GET job and its event stream, so that any tab shows the same. */
import {connected, epoch, get, post, stream} from '../api.js';
import {Chart} from '../chart.js';
import {
  Confirm, Empty, Loading, Problem, Settings, ShareBar, Status, Warnings, clock, duration, html, moment, number, share,
  shown, size, useAction, useData, useEffect, useNow, useState,
} from '../parts.js';
import {METRICS, Report, metricName} from '../report.js';
import {text} from '../text.js';

const PAGE = 20;
const LIST_MS = 3000;
const BATCH_MS = 150; // events that arrive together are shown together
const RETRY_MS = 1000;
const ACTIVE = ['queued', 'preparing', 'running', 'evaluating'];
const AT_REST = ['succeeded', 'failed', 'cancelled', 'paused'];
const PHASES = ['queued', 'preparing', 'running', 'evaluating'];

export function Jobs() {
  const [limit, setLimit] = useState(PAGE);
  const [active, setActive] = useState(true);
  const {data, error} = useData(`/api/training/jobs?limit=${limit}`, active ? LIST_MS : 0);
  const jobs = data?.jobs;
  useEffect(() => {
    if (jobs) setActive(jobs.some((job) => ACTIVE.includes(job.status)));
  }, [jobs]);
  return html`
    <h1>${text.jobs.title}</h1>
    <${Problem} error=${error} />
    ${!data && !error && html`<${Loading} />`}
    ${jobs?.length === 0 && html`<${Empty} href="#/teach" next=${text.jobs.emptyNext}>${text.jobs.empty}<//>`}
    <ul class="list">
      ${jobs?.map(
        (job) => html`
          <li key=${job.job_id}>
            <a class="card item" href=${`#/job/${job.job_id}`}>
              <span class="grow"><strong>${job.adapter_name}</strong> <span class="muted">${text.job.on(job.model)}</span></span>
              <span class="muted">${moment(job.created_at)}</span>
              ${ACTIVE.includes(job.status) && html`<span class="muted">${text.jobs.step(job.progress.step, job.progress.steps)}</span>`}
              <${Status} of=${job.status} />
            </a>
          </li>
        `,
      )}
    </ul>
    ${jobs?.length === limit && html`<button type="button" onClick=${() => setLimit(limit + PAGE)}>${text.jobs.more}</button>`}
  `;
}

const sleep = (milliseconds) => new Promise((ready) => setTimeout(ready, milliseconds));

/** The job and its events, which grow while it runs: {job, events, error, again}. again(): it was resumed. */
function useJob(id) {
  const [state, setState] = useState({job: null, events: [], error: null});
  const [turn, setTurn] = useState(0);
  const back = epoch.value;
  useEffect(() => {
    const abort = new AbortController();
    const path = `/api/training/jobs/${id}`;
    const events = [];
    let last = 0;
    let timer = null;
    const show = (job) => {
      clearTimeout(timer);
      timer = null;
      setState((was) => ({job: job ?? was.job, events: [...events], error: null}));
    };
    const follow = async () => {
      for (;;) {
        show(await get(path, abort.signal));
        const news = stream(`${path}/events`, {headers: {'Last-Event-ID': String(last)}, abort: abort.signal});
        for await (const event of news) {
          last = Number(event.id);
          events.push(JSON.parse(event.data));
          timer ??= setTimeout(show, BATCH_MS);
        }
        const job = await get(path, abort.signal);
        show(job);
        if (AT_REST.includes(job.status)) return;
        await sleep(RETRY_MS);
      }
    };
    follow().catch((error) => {
      if (abort.signal.aborted || !connected.value) return;
      setState((was) => ({...was, error}));
      if (error.status >= 500) timer = setTimeout(() => setTurn((was) => was + 1), RETRY_MS);
    });
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [id, turn, back]);
  return {...state, again: () => setTurn((was) => was + 1)};
}

/** What events say, in the order of steps: those after a resume take the place of those they repeat. */
function told(job, events) {
  const steps = new Map();
  const evaluations = new Map();
  const others = [];
  let {status} = job;
  for (const event of events) {
    if (event.type === 'step') {
      for (const step of [...steps.keys()].reverse()) {
        if (step < event.data.step) break;
        steps.delete(step);
      }
      steps.set(event.data.step, event.data);
    } else if (event.type === 'metrics') {
      evaluations.set(event.data.step, event.data);
    } else {
      others.push(event);
      if (event.type in text.status && !AT_REST.includes(job.status)) status = event.type;
    }
  }
  const shares = [...evaluations.values()].sort((one, other) => one.step - other.step);
  return {status, steps: [...steps.values()], evaluations: shares, others};
}

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
        <${Report} report=${job.report} targets=${job.plan.targets} />
      </section>
    `}
    ${(steps.length > 0 || evaluations.length > 0) && html`
      <div class="halves">
        <${Loss} ...${{steps, evaluations}} />
        ${evaluations.some((one) => Object.keys(one.metrics).length > 0) && html`
          <${Evaluations} ...${{evaluations, targets: job.plan.targets, ended: Boolean(job.report)}} />
        `}
      </div>
    `}
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
      ${job.error && html`<p>${job.error.message}</p>${job.error.hint && html`<p class="muted">${job.error.hint}</p>`}`}
      <div class="row">
        ${made && html`
          <a class="button primary" href=${chat(job.model, made)}>${text.job.compare}</a>
          <a class="button" href=${`#/adapters/${job.adapter.name}`}>${text.job.toAdapter}</a>
        `}
        ${job.status !== 'paused' && html`<a class="button" href="#/teach">${text.job.again}</a>`}
      </div>
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
        onConfirm=${() => act('cancel')} onClose=${() => setAsking(false)}>${text.job.cancelText}<//>
    `}
  `;
}

function Loss({steps, evaluations}) {
  const held = new Map(evaluations.filter((one) => one.eval_loss !== null).map((one) => [one.step, one.eval_loss]));
  const at = [...new Set([...steps.map((one) => one.step), ...held.keys()])].sort((one, other) => one - other);
  const of = new Map(steps.map((one) => [one.step, one.loss]));
  let mean = null;
  const smooth = at.map((step) => {
    const loss = of.get(step);
    if (loss === undefined || loss === null) return mean;
    mean = mean === null ? loss : 0.8 * mean + 0.2 * loss;
    return mean;
  });
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
      <${Chart} data=${data} series=${{x: text.job.step, values}} summary=${summary} />
    </section>
  `;
}

const COLORS = ['accent', 'second', 'third', 'fourth'];

/** The newest shares against their targets and, while there is no report, how they came about. */
function Evaluations({evaluations, targets, ended}) {
  const names = METRICS.filter((name) => evaluations.some((one) => name in one.metrics));
  const newest = evaluations.at(-1);
  const drawn = names.filter((name) => name in targets).slice(0, COLORS.length);
  const at = evaluations.map((one) => one.step);
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
