/** The versions of one adapter as a tree: their metrics, their reports, and what can be done with each. */
import {get, post, put, remove} from '../api.js';
import {Field, Problem, html, moment, share, size, useAction, useEffect, useState} from '../parts.js';
import {Report, metricName} from '../report.js';
import {text} from '../text.js';

const SHOWN = ['efficacy', 'paraphrase', 'specificity', 'retention'];
const DEEPEST = 3; // indentation

/** The report of each version by its identity, null where there is none. A version's report never changes. */
const reports = new Map();

/** Two versions may have one digest: the same request gives the same adapter. */
const identity = (one) => `${one.name}@${one.version} ${one.created_at}`;

const refOf = (one) => `${one.name}@${one.version}`;

/** [version, depth], the newest first; what goes on from a version of the same adapter follows it. */
export function tree(versions) {
  const children = (parent) => versions.filter((one) => one.parent === parent).reverse();
  const below = (one, depth) => [[one, depth], ...children(refOf(one)).flatMap((child) => below(child, depth + 1))];
  const roots = versions.filter((one) => !versions.some((other) => refOf(other) === one.parent)).reverse();
  return roots.flatMap((root) => below(root, 0));
}

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

/** action: that of the adapter. changed(told): something is different now. ask(ref): whether it is to be deleted. */
export function Versions({versions, action, changed, ask}) {
  const found = useReports(versions);
  const [open, setOpen] = useState({id: null, part: null});
  const shown = versions.find((one) => identity(one) === open.id);
  const report = shown && found.get(identity(shown));
  const toggle = (id, part) => setOpen(open.id === id && open.part === part ? {id: null, part: null} : {id, part});
  const promote = (one) =>
    action.run(async () => {
      const now = await post(`/api/adapters/${refOf(one)}/promote`);
      changed(text.adapters.rolledBack(refOf(now)));
    });
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
          ${tree(versions).map(([one, depth]) => {
            const id = identity(one);
            const body = found.get(id);
            const ref = refOf(one);
            return html`
              <tr key=${id}>
                <th scope="row" class=${`depth-${Math.min(depth, DEEPEST)}`}>
                  ${ref} ${one.current && html`<span class="chip succeeded">${text.adapters.current}</span>`}
                  ${one.tags.map((tag) => html` <span class="chip" key=${tag}>${tag}</span>`)}
                  ${one.protected && html` <span class="chip">${text.adapters.protected}</span>`}
                  ${one.parent && html`<small>${text.adapters.from(one.parent)}</small>`}
                </th>
                <td>${moment(one.created_at)}</td>
                ${SHOWN.map((name) => html`<td class="figure" key=${name} data-label=${metricName(name)}>${share(body?.report.metrics[name]?.value)}</td>`)}
                <td>${text.adapters.states[one.state] ?? one.state}${one.bytes ? `, ${size(one.bytes)}` : ''}</td>
                <td>
                  <div class="row tight end">
                    <button type="button" class="small" disabled=${!body} aria-expanded=${String(open.id === id && open.part === 'report')}
                      onClick=${() => toggle(id, 'report')}>
                      ${body === null ? text.adapters.noReport : text.adapters.report}
                      <span class="hidden"> ${ref}</span>
                    </button>
                    <a class="button small" href=${`#/chat?models=${encodeURIComponent(ref)}`}>
                      ${text.adapters.chat}<span class="hidden"> ${ref}</span>
                    </a>
                    ${!one.current && html`
                      <button type="button" class="small" disabled=${action.busy} onClick=${() => promote(one)}>
                        ${text.adapters.promote}<span class="hidden"> ${ref}</span>
                      </button>
                    `}
                    <button type="button" class="small" aria-expanded=${String(open.id === id && open.part === 'manage')}
                      onClick=${() => toggle(id, 'manage')}>
                      ${text.adapters.manage}<span class="hidden"> ${ref}</span>
                    </button>
                  </div>
                </td>
              </tr>
            `;
          })}
        </tbody>
      </table>
    </div>
    ${report && open.part === 'report' && html`
      <section class="inner" aria-label=${text.adapters.reportOf(refOf(shown))}>
        <h3>${text.adapters.reportOf(refOf(shown))}</h3>
        <${Report} report=${report.report} targets=${report.plan.targets} />
      </section>
    `}
    ${shown && open.part === 'manage' && html`<${Manage} key=${open.id} version=${shown} changed=${changed} ask=${ask} />`}
  `;
}

/** Tags, protection, memory and deletion of one version. */
function Manage({version, changed, ask}) {
  const [tag, setTag] = useState('');
  const action = useAction();
  const ref = refOf(version);
  const act = (what, told) =>
    action.run(async () => {
      await what();
      changed(told);
    });
  const add = (event) => {
    event.preventDefault();
    const name = tag.trim();
    if (!name) return;
    act(() => put(`/api/adapters/${ref}/tags/${encodeURIComponent(name)}`), text.adapters.tagged(`${version.name}@${name}`, ref)).then(() => setTag(''));
  };
  const drop = (name) =>
    act(() => remove(`/api/adapters/${version.name}/tags/${encodeURIComponent(name)}`), text.adapters.untagged(`${version.name}@${name}`));
  const protect = () =>
    act(() => (version.protected ? remove : put)(`/api/adapters/${ref}/protection`), text.adapters.protection(ref, !version.protected));
  const turn = () => act(() => post(`/api/adapters/${ref}/${version.state === 'loaded' ? 'unload' : 'load'}`), '');
  return html`
    <section class="inner" aria-label=${text.adapters.manageOf(ref)}>
      <h3>${text.adapters.manageOf(ref)}</h3>
      <p class="muted">${text.adapters.digest} <code>${version.digest}</code></p>
      <${Problem} error=${action.error} />
      <form class="row tagging" onSubmit=${add}>
        ${version.tags.map((name) => html`
          <button key=${name} type="button" class="small" disabled=${action.busy} onClick=${() => drop(name)}>${text.adapters.untag(name)}</button>`)}
        <${Field} id=${`tag-${version.version}`} label=${text.adapters.tag}>
          ${(about) => html`<input ...${about} value=${tag} placeholder=${text.adapters.tagExample} autocomplete="off" onInput=${(event) => setTag(event.target.value)} />`}
        <//>
        <button disabled=${action.busy || !tag.trim()}>${text.adapters.addTag}</button>
      </form>
      <p class="help">${text.adapters.tagHelp(version.name)}</p>
      <div class="row">
        <button type="button" disabled=${action.busy} onClick=${protect}>
          ${version.protected ? text.adapters.unprotect : text.adapters.protect}<span class="hidden"> ${ref}</span>
        </button>
        <button type="button" disabled=${action.busy} onClick=${turn}>
          ${version.state === 'loaded' ? text.adapters.unload : text.adapters.load}<span class="hidden"> ${ref}</span>
        </button>
        <button type="button" class="danger quiet" disabled=${action.busy || version.protected} onClick=${() => ask(ref)}>
          ${text.adapters.remove}<span class="hidden"> ${ref}</span>
        </button>
      </div>
    </section>
  `;
}
