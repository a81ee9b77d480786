/** Machine: the server, its base models, and what is in memory. */
import {connected, post} from '../api.js';
import {Confirm, Empty, Loading, Problem, html, parameters, size, useAction, useData, useState} from '../parts.js';
import {text} from '../text.js';

const LOADING_MS = 1500;

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
    <section class="card" aria-labelledby="health">
      <h2 id="health">${text.machine.health}</h2>
      <p class=${connected.value ? 'good' : 'bad'}>${connected.value ? text.machine.healthy : text.machine.unhealthy}</p>
      <dl class="lines"><div><dt>${text.machine.address}</dt><dd><code>${location.origin}</code></dd></div></dl>
      <div class="row">
        <a class="button" href="/docs">${text.machine.docs}</a>
        <a class="button" href="/openapi.json">${text.machine.document}</a>
      </div>
    </section>
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
      <p class="muted">
        ${base.bytes !== null && `${text.machine.parameters} ${parameters(base.parameters)} · ${text.machine.size} ${size(base.bytes)} · `}
        ${text.machine.source} <code>${base.source}</code>
      </p>
      ${base.fit && base.state !== 'loaded' && html`
        <p class="muted">${text.machine.fit(size(base.fit.serve), base.fit.serving, size(base.fit.teach), base.fit.teaching)}</p>`}
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
