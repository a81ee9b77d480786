/** Adapters: names, their versions, what was measured of each, and what can be done with them. */
import {post, remove} from '../api.js';
import {Confirm, Empty, Loading, Problem, html, useAction, useData, useState} from '../parts.js';
import {text} from '../text.js';
import {Comparison} from './comparison.js';
import {Exports} from './exports.js';
import {Import} from './import.js';
import {Versions} from './versions.js';

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
  const restore = (ref) =>
    undoing.run(async () => {
      await post(`/api/adapters/${ref}/restore`);
      changed(text.adapters.restored(ref));
    });
  const gone = data?.deleted?.map((one) => `${one.name}@${one.version}`) ?? [];
  return html`
    <h1>${text.adapters.title}</h1>
    <p class="lead">${text.adapters.lead}</p>
    <p class="done" role="status">${done}</p>
    ${undo && html`<button type="button" class="small" disabled=${undoing.busy} onClick=${() => restore(undo)}>${text.adapters.undo(undo)}</button>`}
    <${Problem} error=${error ?? undoing.error} />
    ${!data && !error && html`<${Loading} />`}
    ${data && names.length === 0 && html`<${Empty} href="#/teach" next=${text.adapters.emptyNext}>${text.adapters.empty}<//>`}
    ${data?.damaged.map((one) => html`<${Problem} key=${one.message} error=${one} />`)}
    ${names.map(
      (name) => html`
        <${Adapter} key=${name} name=${name} open=${name === id || names.length === 1} changed=${changed}
          versions=${data.adapters.filter((one) => one.name === name)} all=${data.adapters} />
      `,
    )}
    <${Import} changed=${changed} />
    ${gone.length > 0 && html`
      <details class="card deleted">
        <summary>${text.adapters.deleted(gone.length)}</summary>
        <div class="row">
          ${gone.map((ref) => html`
            <button key=${ref} type="button" class="small" disabled=${undoing.busy} onClick=${() => restore(ref)}>${text.adapters.undo(ref)}</button>`)}
        </div>
      </details>
    `}
  `;
}

/** versions: of the adapter, oldest first; all: of all adapters, to compare with. */
function Adapter({name, versions, all, open, changed}) {
  const [isOpen, setOpen] = useState(open);
  const [asking, setAsking] = useState(null);
  const action = useAction();
  const current = versions.find((one) => one.current);
  const older = current && versions.some((one) => one.version < current.version);
  const rollback = () =>
    action.run(async () => {
      const now = await post(`/api/adapters/${name}/rollback`);
      changed(text.adapters.rolledBack(`${now.name}@${now.version}`));
    });
  const drop = (ref) =>
    action.run(async () => {
      await remove(`/api/adapters/${ref}`);
      changed(text.adapters.removed(ref), ref);
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
        <${Versions} ...${{versions, action, changed, ask: setAsking}} />
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
        ${all.length > 1 && html`<${Comparison} name=${name} versions=${versions} all=${all} />`}
        <${Exports} name=${name} versions=${versions} />
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
