/** Machine: the server, its base models, and what is in memory. */
import {connected, post} from '../api.js';
import {
  Confirm, Empty, Field, Loading, Problem, Warnings, html, number, parameters, percent, size, useAction, useData, useState,
} from '../parts.js';
import {text} from '../text.js';

const LOADING_MS = 1500;
const MACHINE_MS = 5000;

export function Machine() {
  const [loading, setLoading] = useState(0);
  const {data, error, reload} = useData('/api/models', loading ? LOADING_MS : 0);
  const {data: adapters, reload: reloadAdapters} = useData('/api/adapters');
  const changed = () => {
    reload();
    reloadAdapters();
  };
  const inMemory = adapters?.adapters.filter((one) => one.state === 'loaded') ?? [];
  return html`
    <h1>${text.machine.title}</h1>
    <p class="lead">${text.machine.lead}</p>
    <${Server} />
    <section class="card" aria-labelledby="bases">
      <h2 id="bases">${text.machine.bases}</h2>
      <${Problem} error=${error} />
      ${!data && !error && html`<${Loading} />`}
      ${data?.models.length === 0 && html`<${Empty}>${text.machine.empty}<//>`}
      <ul class="bases">
        ${data?.models.map(
          (one) => html`<${Base} key=${one.id} base=${one} changed=${changed} begun=${(by) => setLoading((was) => was + by)} />`,
        )}
      </ul>
      <${Add} changed=${changed} />
    </section>
    <section class="card" aria-labelledby="in-memory">
      <h2 id="in-memory">${text.machine.adapters}</h2>
      ${inMemory.length === 0
        ? html`<p class="muted">${text.machine.noAdapters}</p>`
        : html`<dl class="lines">
            ${inMemory.map(
              (one) => html`
                <div key=${`${one.name}@${one.version}`}>
                  <dt><a href=${`#/adapters/${one.name}`}>${one.name}@${one.version}</a></dt><dd>${size(one.bytes)}</dd>
                </div>
              `,
            )}
          </dl>`}
    </section>
  `;
}

/** What the machine is, what the server does at present, and advice in words. */
function Server() {
  const {data, error} = useData('/api/machine', MACHINE_MS);
  const {data: work} = useData('/api/training/jobs?limit=20', MACHINE_MS);
  const job = work?.jobs.find((one) => one.status === 'running');
  const words = text.machine;
  const figures = data && {
    [words.processor]: `${data.processor}, ${words.cores(data.cores)}`,
    [words.memory]: words.free(size(data.memory_available), size(data.memory)),
    [words.disk]: words.free(size(data.disk_free)),
    [words.computes]: `${data.device}, ${words.kernels(data.kernels)}, ${words.weights(data.weights)}`,
    [words.replies]: number(data.replies),
    [words.queue]: number(data.queue.length),
    [words.training]: job
      ? html`<a href=${`#/job/${job.job_id}`}>${job.adapter_name}</a> ${job.progress.tokens_per_second
          ? words.speed(number(job.progress.tokens_per_second, 3)) : ''}`
      : text.none,
    [words.version]: `fortwo ${data.fortwo}, torch ${data.torch}`,
    [words.address]: html`<code>${location.origin}</code>`,
  };
  return html`
    <section class="card" aria-labelledby="health">
      <h2 id="health">${words.health}</h2>
      <p class=${connected.value ? 'good' : 'bad'}>${connected.value ? words.healthy : words.unhealthy}</p>
      <${Problem} error=${error} />
      ${data && (data.advice.length
        ? html`<${Warnings} of=${data.advice.map((one) => ({code: '', ...one}))} />`
        : html`<p class="advice">${words.noAdvice}</p>`)}
      ${figures && html`
        <dl class="lines">
          ${Object.entries(figures).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
        </dl>
      `}
      <div class="row">
        <a class="button" href="/docs">${words.docs}</a>
        <a class="button" href="/openapi.json">${words.document}</a>
      </div>
    </section>
  `;
}

/** begun(1) when a load begins, begun(-1) when it ends. */
function Base({base, changed, begun}) {
  const action = useAction();
  const [asking, setAsking] = useState(false);
  const turn = (what) =>
    action.run(async () => {
      begun(1);
      try {
        await post(`/api/models/${base.id}/${what}`);
      } finally {
        begun(-1);
        changed();
      }
    });
  const loading = action.busy || base.state === 'loading';
  return html`
    <li>
      <div class="heading">
        <strong>${base.id}</strong>
        <span class=${`chip ${base.state === 'loaded' ? 'succeeded' : ''}`}>${text.machine.states[base.state] ?? base.state}</span>
        ${base.fit && html`
          <span class=${`chip ${FITS[base.fit.serving]}`}>${text.machine.toChat}: ${text.machine.fits[base.fit.serving]}</span>
          <span class=${`chip ${FITS[base.fit.teaching]}`}>${text.machine.toTeach}: ${text.machine.fits[base.fit.teaching]}</span>
        `}
        <span class="grow"></span>
        ${base.state === 'loaded'
          ? html`<button type="button" class="small" disabled=${loading} onClick=${() => turn('unload')}>
              ${text.machine.unload}<span class="hidden"> ${base.id}</span></button>`
          : html`<button type="button" class="small" disabled=${loading}
              onClick=${() => (base.state === 'not fetched' ? setAsking(true) : turn('load'))}>
              ${loading ? text.machine.loading : base.state === 'not fetched' ? text.machine.fetch : text.machine.load}
              <span class="hidden"> ${base.id}</span></button>`}
      </div>
      ${base.description && html`<p>${base.description}</p>`}
      ${base.progress && html`<${Progress} ...${base.progress} />`}
      <p class="muted">
        ${base.bytes !== null && `${text.machine.parameters} ${parameters(base.parameters)} · ${text.machine.size} ${size(base.bytes)} · `}
        ${text.machine.source} <code>${base.source}</code>
      </p>
      ${base.fit && base.state !== 'loaded' && html`<p class="muted">${text.machine.fit(size(base.fit.serve), size(base.fit.teach))}</p>`}
      <${Problem} error=${action.error ?? base.error} />
      ${asking && html`
        <${Confirm} danger=${false} title=${text.machine.fetchTitle(base.id)} confirm=${text.machine.fetchConfirm}
          keep=${text.machine.notNow} onConfirm=${() => turn('load')} onClose=${() => setAsking(false)}>
          ${text.machine.fetchText(base.source)}
        <//>
      `}
    </li>
  `;
}

const FITS = {fits: 'succeeded', tight: 'paused', 'too large': 'failed'};

function Progress({label, done, total}) {
  const part = total ? done / total : 0;
  return html`
    <p class="muted" role="status">${label} ${percent(part)}</p>
    <progress max="1" value=${part} aria-label=${label}></progress>
  `;
}

/** changed(): there is a new base. */
function Add({changed}) {
  const [id, setId] = useState('');
  const [source, setSource] = useState('');
  const [told, setTold] = useState('');
  const action = useAction();
  const add = (event) => {
    event.preventDefault();
    action.run(async () => {
      const added = await post('/api/models', {id: id.trim(), source: source.trim()});
      setTold(text.machine.added(added.id, added.download ? size(added.download) : null, added.licence));
      setId('');
      setSource('');
      changed();
    });
  };
  return html`
    <details class="add-base">
      <summary>${text.machine.add}</summary>
      <form onSubmit=${add}>
        <div class="pair">
          <${Field} id="base-id" label=${text.machine.id} help=${text.machine.idHelp}>
            ${(about) => html`<input ...${about} value=${id} required autocomplete="off" onInput=${(event) => setId(event.target.value)} />`}
          <//>
          <${Field} id="base-source" label=${text.machine.source} help=${text.machine.sourceHelp}>
            ${(about) => html`<input ...${about} value=${source} required autocomplete="off" onInput=${(event) => setSource(event.target.value)} />`}
          <//>
        </div>
        <${Problem} error=${action.error} />
        <p class="done" role="status">${told}</p>
        <div class="row"><button disabled=${action.busy || !id.trim() || !source.trim()}>${text.machine.addSubmit}</button></div>
      </form>
    </details>
  `;
}
