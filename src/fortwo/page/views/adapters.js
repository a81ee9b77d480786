/** Adapters: names, their versions, what was measured of each, and what can be done with them. */
import {get, post, remove} from '../api.js';
import {
  Confirm, Empty, Loading, Problem, html, moment, share, size, useAction, useData, useEffect, useState,
} from '../parts.js';
import {Report, metricName} from '../report.js';
import {text} from '../text.js';

const SHOWN = ['efficacy', 'paraphrase', 'specificity', 'retention'];

/** id: the adapter that is open at first. */
export function Adapters({id}) {
  const {data, error, reload} = useData('/api/adapters');
  const [done, setDone] = useState('');
  const [undo, setUndo] = useState(null); // what was deleted last
  const undoing = useAction();
  const names = [...new Set(data?.adapters.map((one) => one.name))];
  const changed = (told = '', deleted = null) => {
    setDone(told);
    setUndo(deleted);
    reload();
  };
  const restore = () =>
    undoing.run(async () => {
      await post(`/api/adapters/${undo}/restore`);
      changed(text.adapters.restored(undo));
    });
  return html`
    <h1>${text.adapters.title}</h1>
    <p class="lead">${text.adapters.lead}</p>
    <p class="done" role="status">${done}</p>
    ${undo && html`<button type="button" class="small" disabled=${undoing.busy} onClick=${restore}>${text.adapters.undo(undo)}</button>`}
    <${Problem} error=${error ?? undoing.error} />
    ${!data && !error && html`<${Loading} />`}
    ${data && names.length === 0 && html`<${Empty} href="#/teach" next=${text.adapters.emptyNext}>${text.adapters.empty}<//>`}
    ${names.map(
      (name) => html`
        <${Adapter} key=${name} name=${name} open=${name === id || names.length === 1} changed=${changed}
          versions=${data.adapters.filter((one) => one.name === name).reverse()} />
      `,
    )}
  `;
}

function Adapter({name, versions, open, changed}) {
  const [isOpen, setOpen] = useState(open);
  const [asking, setAsking] = useState(null);
  const action = useAction();
  const current = versions.find((one) => one.current);
  const older = current && versions.some((one) => one.version < current.version);
  const act = (what) => action.run(what);
  const rollback = () =>
    act(async () => {
      const now = await post(`/api/adapters/${name}/rollback`);
      changed(text.adapters.rolledBack(`${now.name}@${now.version}`));
    });
  const drop = (ref) =>
    act(async () => {
      await remove(`/api/adapters/${ref}`);
      changed(text.adapters.removed(ref), ref);
    });
  const promote = (version) =>
    act(async () => {
      const now = await post(`/api/adapters/${name}@${version.version}/promote`);
      changed(text.adapters.rolledBack(`${now.name}@${now.version}`));
    });
  const turn = (version) =>
    act(async () => {
      await post(`/api/adapters/${name}@${version.version}/${version.state === 'loaded' ? 'unload' : 'load'}`);
      changed();
    });
  return html`
    <section class="card adapter" aria-labelledby=${`adapter-${name}`}>
      <div class="heading">
        <h2 id=${`adapter-${name}`}>
          <button type="button" class="fold" aria-expanded=${String(isOpen)} onClick=${() => setOpen(!isOpen)}>${name}</button>
        </h2>
        <span class="muted grow">${text.job.on(versions[0].base_model)} · ${text.adapters.versions(versions.length)}</span>
        <span class=${current ? 'chip succeeded' : 'chip'}>
          ${current ? `${text.adapters.current} ${name}@${current.version}` : text.adapters.noCurrent}
        </span>
      </div>
      <${Problem} error=${action.error} />
      ${isOpen && html`
        <${Versions} ...${{versions, busy: action.busy, turn, promote, ask: setAsking}} />
        <div class="row">
          ${current && html`
            <a class="button" href=${`#/chat?models=${encodeURIComponent(current.base_model)},${encodeURIComponent(name)}`}>${text.adapters.compare}</a>
          `}
          <button type="button" disabled=${action.busy || !older} title=${text.adapters.rollbackHelp} onClick=${rollback}>
            ${text.adapters.rollback}
          </button>
          <button type="button" class="danger quiet" disabled=${action.busy} onClick=${() => setAsking(name)}>
            ${text.adapters.removeAll}
          </button>
        </div>
      `}
      ${asking && html`
        <${Confirm} title=${text.adapters.removeTitle(asking)} confirm=${text.adapters.remove} keep=${text.adapters.keep}
          onConfirm=${() => drop(asking)} onClose=${() => setAsking(null)}>
          ${asking === name ? text.adapters.removeText(text.adapters.versions(versions.length)) : text.adapters.removeOne}
        <//>
      `}
    </section>
  `;
}

/** The report of each version by its identity, null where there is none. A version's report never changes. */
const reports = new Map();

/** Two versions may have one digest: the same request gives the same adapter. */
const identity = (one) => `${one.name}@${one.version} ${one.created_at}`;

function useReports(versions) {
  const [, setCount] = useState(0);
  const wanted = versions.map(identity).join();
  useEffect(() => {
    let gone = false;
    for (const one of versions.filter((version) => !reports.has(identity(version)))) {
      get(`/api/adapters/${one.name}/report?version=${one.version}`)
        .catch((error) => (error.status === 404 ? null : undefined))
        .then((body) => {
          if (body !== undefined) reports.set(identity(one), body);
          if (!gone) setCount((was) => was + 1);
        });
    }
    return () => {
      gone = true;
    };
  }, [wanted]);
  return reports;
}

function Versions({versions, busy, turn, promote, ask}) {
  const found = useReports(versions);
  const [open, setOpen] = useState(null);
  const shown = versions.find((one) => identity(one) === open);
  const report = shown && found.get(identity(shown));
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label=${text.adapters.versions(versions.length)}>
      <table class="versions">
        <thead>
          <tr>
            <th scope="col">${text.adapters.version}</th>
            <th scope="col">${text.adapters.made}</th>
            ${SHOWN.map((name) => html`<th scope="col" class="figure" key=${name}>${metricName(name)}</th>`)}
            <th scope="col">${text.adapters.state}</th>
            <th scope="col"><span class="hidden">${text.adapters.actions}</span></th>
          </tr>
        </thead>
        <tbody>
          ${versions.map((one) => {
            const id = identity(one);
            const body = found.get(id);
            const ref = `${one.name}@${one.version}`;
            return html`
              <tr key=${id}>
                <th scope="row">${ref} ${one.current && html`<span class="chip succeeded">${text.adapters.current}</span>`}
                  ${one.tags.map((tag) => html` <span class="chip" key=${tag}>${tag}</span>`)}
                  ${one.protected && html` <span class="chip">${text.adapters.protected}</span>`}</th>
                <td>${moment(one.created_at)}</td>
                ${SHOWN.map((name) => html`<td class="figure" key=${name} data-label=${metricName(name)}>${share(body?.report.metrics[name]?.value)}</td>`)}
                <td>${text.adapters.states[one.state] ?? one.state}${one.bytes ? `, ${size(one.bytes)}` : ''}</td>
                <td>
                  <div class="row tight end">
                    <button type="button" class="small" disabled=${!body} aria-expanded=${String(open === id)}
                      onClick=${() => setOpen(open === id ? null : id)}>
                      ${body === null ? text.adapters.noReport : text.adapters.report}
                      <span class="hidden"> ${ref}</span>
                    </button>
                    <a class="button small" href=${`#/chat?models=${encodeURIComponent(ref)}`}>
                      ${text.adapters.chat}<span class="hidden"> ${ref}</span>
                    </a>
                    ${!one.current && html`
                      <button type="button" class="small" disabled=${busy} onClick=${() => promote(one)}>
                        ${text.adapters.promote}<span class="hidden"> ${ref}</span>
                      </button>
                    `}
                    <button type="button" class="small" disabled=${busy} onClick=${() => turn(one)}>
                      ${one.state === 'loaded' ? text.adapters.unload : text.adapters.load}<span class="hidden"> ${ref}</span>
                    </button>
                    <button type="button" class="small danger quiet" disabled=${busy} onClick=${() => ask(ref)}>
                      ${text.adapters.remove}<span class="hidden"> ${ref}</span>
                    </button>
                  </div>
                </td>
              </tr>
            `;
          })}
        </tbody>
      </table>
    </div>
    ${report && html`
      <section class="inner" aria-label=${text.adapters.reportOf(`${shown.name}@${shown.version}`)}>
        <h3>${text.adapters.reportOf(`${shown.name}@${shown.version}`)}</h3>
        <${Report} report=${report.report} targets=${report.plan.targets} />
      </section>
    `}
  `;
}
