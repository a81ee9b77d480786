/** Teach: a fact or rows of data on one side, and on the other what would be done with them. */
import {connected, post} from '../api.js';
import {EMPTY, adapterName, changed, draft, lines, request, set} from '../draft.js';
import {Field, Problem, html, parameters, size, useAction, useData, useEffect, useState} from '../parts.js';
import {text} from '../text.js';
import {Rows} from './dataset.js';
import {Plan, usePlan} from './plan.js';

export function Teach() {
  const {data: models, error: noModels, reload} = useData('/api/models');
  const {data: known} = useData('/v1/models');
  const [fetched, setFetched] = useState('');
  const {model, tab} = draft.value;
  const bases = models?.models ?? [];
  const base = bases.find((one) => one.id === model);
  const likely = ['loaded', 'loading', 'on disk', 'not fetched'].flatMap((state) => bases.filter((one) => one.state === state));
  useEffect(() => {
    if (!base && likely.length) set({model: likely[0].id});
  }, [base, likely.length]);
  const ready = base !== undefined && (base.state !== 'not fetched' || fetched === base.id);
  const {body, missing, error} = request.value;
  const plan = usePlan(body ?? null, ready && connected.value);
  return html`
    <h1>${text.teach.title}</h1>
    <p class="lead">${text.teach.lead}</p>
    <${Problem} error=${noModels} />
    <div class="beside">
      <form class="card" onSubmit=${(event) => event.preventDefault()} aria-label=${text.teach.title}>
        <${Changes} of=${draft.value.changes} />
        <${Tabs} tab=${tab} />
        <div role="tabpanel" id="teach-panel" aria-labelledby=${`tab-${tab}`}>
          ${tab === 'fact' ? html`<${Fact} />` : html`<${Rows} base=${base} Box=${Box} />`}
        </div>
        <div class="pair">
          <${Field} id="name" label=${text.teach.name} help=${text.teach.nameHelp}>
            ${(about) => html`<input ...${about} value=${draft.value.name} placeholder=${adapterName.value} maxlength="128"
              autocomplete="off" spellcheck="false" onInput=${(event) => set({name: event.target.value})} />`}
          <//>
          <${Field} id="base" label=${text.teach.base}>
            ${(about) => html`
              <select ...${about} value=${base?.id ?? ''} onChange=${(event) => set({model: event.target.value})}>
                ${bases.map(
                  (one) => html`<option key=${one.id} value=${one.id}>
                    ${one.state === 'not fetched' ? `${one.id} (${text.teach.notFetched})` : one.id}
                  </option>`,
                )}
              </select>`}
          <//>
        </div>
        <${More} known=${known?.data ?? []} />
        <div class="row end">
          <button type="button" class="quiet" onClick=${() => set({...EMPTY, tab})}>${text.teach.clear}</button>
        </div>
      </form>
      <section class="card plan" aria-labelledby="plan-title">
        <h2 id="plan-title">${text.plan.title}</h2>
        ${base && !ready && html`
          <div class="problem warning">
            <p>${text.plan.fetch(base.id)}</p>
            <p class="muted">
              ${base.source}${base.fit ? ` · ${text.plan.fetchSize(parameters(base.fit.parameters), size(base.fit.teach))}` : ''}
              ${base.licence ? ` · ${base.licence}` : ''}
            </p>
            <button type="button" onClick=${() => setFetched(base.id)}>${text.plan.fetchButton}</button>
          </div>
        `}
        <${Plan} ...${{plan, body, missing, error, onPlanned: reload}} />
      </section>
    </div>
  `;
}

/** How the next try differs from a job that failed. */
function Changes({of}) {
  if (!of.length) return null;
  return html`
    <div class="problem warning" role="status">
      <p class="message">${text.teach.changes}</p>
      <ul>${of.map((one) => html`<li key=${one.setting}>${text.teach.change(one.setting, one.value)}</li>`)}</ul>
    </div>
  `;
}

function Tabs({tab}) {
  const tabs = ['fact', 'rows'];
  const keys = (event) => {
    if (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight') return;
    const other = tabs[1 - tabs.indexOf(tab)];
    set({tab: other});
    document.getElementById(`tab-${other}`)?.focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${text.teach.tabs.label} onKeyDown=${keys}>
      ${tabs.map(
        (one) => html`
          <button key=${one} type="button" role="tab" id=${`tab-${one}`} aria-selected=${String(one === tab)}
            aria-controls="teach-panel" tabindex=${one === tab ? 0 : -1} onClick=${() => set({tab: one})}>
            ${text.teach.tabs[one]}
          </button>
        `,
      )}
    </div>
  `;
}

/** A text box of the draft. */
function Box({name, rows, example}) {
  const {[`${name}Help`]: help, [`${name}Example`]: placeholder, [name]: label} = text.teach;
  const typed = (event) => set({[name]: event.target.value});
  return html`
    <${Field} id=${name} label=${label} help=${help}>
      ${(about) =>
        rows
          ? html`<textarea ...${about} rows=${rows} placeholder=${placeholder} value=${draft.value[name]} onInput=${typed} />`
          : html`<input ...${about} placeholder=${placeholder} value=${draft.value[name]} autocomplete="off" onInput=${typed} />`}
    <//>
  `;
}

function Fact() {
  const {subject, aliases, match, questions} = draft.value;
  const asking = useAction();
  const suggest = () =>
    asking.run(async () => {
      const own = lines(questions);
      const given = {subject: subject.trim(), aliases: lines(aliases), match: lines(match), questions: own};
      const {questions: added} = await post('/api/facts/questions', given);
      set({questions: [...own, ...added].join('\n')});
    });
  return html`
    <${Box} name="subject" />
    <${Box} name="answer" rows=${2} />
    <${Box} name="match" rows=${2} />
    <${Box} name="questions" rows=${5} />
    <div class="row end under">
      <button type="button" class="small" disabled=${!subject.trim() || asking.busy} onClick=${suggest}>${text.teach.suggest}</button>
    </div>
    <${Problem} error=${asking.error} />
    <${Box} name="aliases" rows=${2} />
  `;
}

function More({known}) {
  const {effort, parent} = draft.value;
  const parents = known.filter((one) => one.parent !== null && !/@.*-/.test(one.id)).map((one) => one.id);
  if (parent && !parents.includes(parent)) parents.push(parent);
  return html`
    <details class="more">
      <summary>${text.teach.more} ${changed.value > 0 && html`<span class="chip">${text.teach.changed(changed.value)}</span>`}</summary>
      <div class="pair">
        <${Field} id="effort" label=${text.teach.effort}>
          ${(about) => html`
            <select ...${about} value=${effort} onChange=${(event) => set({effort: event.target.value})}>
              ${Object.entries(text.teach.efforts).map(([one, label]) => html`<option key=${one} value=${one}>${label}</option>`)}
            </select>`}
        <//>
        <${Field} id="parent" label=${text.teach.parent} help=${text.teach.parentHelp}>
          ${(about) => html`
            <select ...${about} value=${parent} onChange=${(event) => set({parent: event.target.value})}>
              <option value="">${text.teach.parentNone}</option>
              ${parents.map((one) => html`<option key=${one} value=${one}>${one}</option>`)}
            </select>`}
        <//>
      </div>
      <${Box} name="config" rows=${3} />
    </details>
  `;
}

