/** Teach: a fact or rows of data on one side, and on the other what would be done with them. */
import {computed, effect, signal} from '../vendor/signals.js';
import {connected, hasKey, post} from '../api.js';
import {
  Field, Problem, Settings, Warnings, duration, html, number, size, useAction, useData, useEffect, useNow,
  useState,
} from '../parts.js';
import {text} from '../text.js';

const KEPT = 'fortwo.draft';
const TYPING_MS = 600;
const LARGEST_FILE = 20e6;
const EMPTY = {
  tab: 'fact', name: '', model: '', subject: '', aliases: '', answer: '', match: '', questions: '', rows: '',
  effort: 'normal', parent: '', config: '',
};

/** What is typed; it outlives a reload of the tab. */
const draft = signal({...EMPTY, ...JSON.parse(sessionStorage.getItem(KEPT) ?? '{}')});
effect(() => {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(draft.value));
  } catch {
    sessionStorage.removeItem(KEPT); // large rows do not fit; they are lost on a reload
  }
});

const set = (changes) => {
  draft.value = {...draft.value, ...changes};
};

/** Another view's way here: the question is filled in. */
export function teachAnswerTo(question) {
  set({...EMPTY, model: draft.value.model, questions: question});
  location.hash = '#/teach';
}

const lines = (typed) => typed.split('\n').map((line) => line.trim()).filter(Boolean);
const slug = (name) => name.replace(/[^A-Za-z0-9._-]+/g, '-').replace(/^[^A-Za-z0-9]+|-+$/g, '').slice(0, 60).toLowerCase();

/** Rows as typed or dropped: {rows} or {error}. */
function parseRows(typed) {
  try {
    const whole = JSON.parse(typed);
    return {rows: Array.isArray(whole) ? whole : [whole]};
  } catch (problem) {
    if (typed.trimStart().startsWith('[')) return {error: notJson(null, problem)};
  }
  const rows = [];
  for (const [place, line] of typed.split('\n').entries()) {
    if (!line.trim()) continue;
    try {
      rows.push(JSON.parse(line));
    } catch (problem) {
      return {error: notJson(place + 1, problem)};
    }
  }
  return {rows};
}

const notJson = (line, problem) => ({
  message: text.teach.notJson(line, problem.message),
  hint: text.teach.notJsonHint,
});

const adapterName = computed(() => draft.value.name.trim() || slug(draft.value.subject) || (draft.value.tab === 'rows' ? 'my-adapter' : ''));

/** Of the draft: {body} to be sent, {missing} what is not given yet, or {error}. */
const request = computed(() => {
  const {tab, model, subject, aliases, answer, match, questions, rows, effort, parent, config} = draft.value;
  const {missing} = text.teach;
  if (!model) return {missing: missing.plan};
  let dataset;
  if (tab === 'fact') {
    if (!subject.trim()) return {missing: missing.subject};
    if (!answer.trim()) return {missing: missing.answer};
    if (!lines(match).length) return {missing: missing.match};
    if (!lines(questions).length) return {missing: missing.questions};
    const fact = {subject: subject.trim(), answer: answer.trim(), match: lines(match), questions: lines(questions)};
    if (lines(aliases).length) fact.aliases = lines(aliases);
    dataset = {facts: [fact]};
  } else {
    if (!rows.trim()) return {missing: missing.rows};
    const parsed = parseRows(rows);
    if (parsed.error) return {error: parsed.error};
    const facts = parsed.rows.some((row) => row !== null && typeof row === 'object' && 'subject' in row);
    dataset = facts ? {facts: parsed.rows} : {examples: parsed.rows};
  }
  let more = {};
  if (config.trim()) {
    try {
      more = JSON.parse(config);
    } catch (problem) {
      return {error: notJson(null, problem)};
    }
    if (more === null || typeof more !== 'object' || Array.isArray(more)) {
      return {error: {message: text.teach.configNotObject, hint: text.teach.configNotObjectHint}};
    }
  }
  const body = {model, adapter_name: adapterName.value, dataset};
  if (effort !== 'normal') body.effort = effort;
  if (parent) body.parent = parent;
  return {body: {...more, ...body}};
});

/**
 * The plan of the newest request. One is asked for at a time: what is typed meanwhile is planned behind it.
 * Gives {planning since when, of: the body planned, plan, error}.
 */
function usePlan(body, allowed) {
  const [state, setState] = useState({since: null, of: null, plan: null, error: null});
  const wanted = body === null ? null : JSON.stringify(body);
  useEffect(() => {
    if (wanted === null || !allowed || state.since !== null || state.of === wanted) return undefined;
    const timer = setTimeout(() => {
      setState((was) => ({...was, since: Date.now() / 1000}));
      post('/api/training/plan', JSON.parse(wanted)).then(
        (plan) => setState({since: null, of: wanted, plan, error: null}),
        (error) => setState({since: null, of: error.status === 0 ? null : wanted, plan: null, error}),
      );
    }, TYPING_MS);
    return () => clearTimeout(timer);
  }, [wanted, allowed, state.since, state.of]);
  return {...state, current: wanted !== null && state.of === wanted};
}

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
        <${Tabs} tab=${tab} />
        <div role="tabpanel" id="teach-panel" aria-labelledby=${`tab-${tab}`}>
          ${tab === 'fact' ? html`<${Fact} />` : html`<${Rows} base=${base} />`}
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
            <p class="muted">${base.source}</p>
            <button type="button" onClick=${() => setFetched(base.id)}>${text.plan.fetchButton}</button>
          </div>
        `}
        <${Plan} ...${{plan, body, missing, error, onPlanned: reload}} />
      </section>
    </div>
  `;
}

function Tabs({tab}) {
  const tabs = ['fact', 'rows'];
  const keys = (event) => {
    if (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight') return;
    const other = tabs[1 - tabs.indexOf(tab)];
    set({tab: other});
    document.getElementById(`tab-${other}`).focus();
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
  const {subject, questions} = draft.value;
  const suggest = () => {
    const asked = lines(questions);
    const added = text.teach.suggestions(subject.trim()).filter((one) => !asked.includes(one));
    set({questions: [...asked, ...added].join('\n')});
  };
  return html`
    <${Box} name="subject" />
    <${Box} name="answer" rows=${2} />
    <${Box} name="match" rows=${2} />
    <${Box} name="questions" rows=${5} />
    <div class="row end under">
      <button type="button" class="small" disabled=${!subject.trim()} onClick=${suggest}>${text.teach.suggest}</button>
    </div>
    <${Box} name="aliases" rows=${2} />
  `;
}

function Rows({base}) {
  const [over, setOver] = useState(false);
  const [refused, setRefused] = useState(null);
  const take = async (file) => {
    if (!file) return;
    if (file.size > LARGEST_FILE) {
      setRefused({message: text.teach.fileTooLarge(file.name), hint: text.teach.fileTooLargeHint});
      return;
    }
    setRefused(null);
    const content = await file.text();
    const paragraphs = file.name.endsWith('.txt') && content.split(/\n\s*\n/).filter((one) => one.trim());
    const name = draft.value.name || slug(file.name.replace(/\.[a-z]+$/i, ''));
    set({name, rows: paragraphs ? paragraphs.map((one) => JSON.stringify({text: one.trim()})).join('\n') : content});
  };
  const dragged = (inside) => (event) => {
    event.preventDefault();
    setOver(inside);
  };
  const {body} = request.value;
  const listed = body && (body.dataset.facts ?? body.dataset.examples);
  return html`
    <div class=${over ? 'drop over' : 'drop'} onDragOver=${dragged(true)} onDragLeave=${dragged(false)}
      onDrop=${(event) => {
        dragged(false)(event);
        take(event.dataTransfer.files[0]);
      }}>
      <span>${text.teach.drop}</span>
      <label class="button" for="file">${text.teach.choose}</label>
      <input id="file" class="hidden" type="file" accept=".json,.jsonl,.txt" onChange=${(event) => {
        take(event.target.files[0]);
        event.target.value = '';
      }} />
    </div>
    <${Problem} error=${refused} />
    <${Box} name="rows" rows=${8} />
    ${listed && html`<p class="found" role="status">${text.teach.rowsFound(listed.length, Boolean(body.dataset.facts))}</p>`}
    ${body?.dataset.examples && base && base.state !== 'not fetched' && html`
      <${Preview} dataset=${JSON.stringify({examples: body.dataset.examples.slice(0, 3)})} model=${base.id} />
    `}
  `;
}

/** The first rows with what is learned of them; what is wrong with them is the plan's to say. */
function Preview({dataset, model}) {
  const [preview, setPreview] = useState(null);
  useEffect(() => {
    const abort = new AbortController();
    const timer = setTimeout(() => {
      post('/api/data/preview', {dataset: JSON.parse(dataset), model, rows: 3}, abort.signal).then(
        setPreview,
        () => setPreview(null),
      );
    }, TYPING_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [dataset, model]);
  if (!preview) return null;
  return html`
    <details class="preview" open>
      <summary>${text.teach.preview}</summary>
      <p class="help">${text.teach.previewHelp}</p>
      ${preview.rows.map(
        (row) => html`
          <div key=${row.line}>
            <p class="muted">${text.teach.previewRow(row.line, row.tokens, row.supervised_tokens)}</p>
            <pre tabindex="0">${row.segments.map((one) => (one.supervised ? html`<mark>${one.text}</mark>` : one.text))}</pre>
          </div>
        `,
      )}
    </details>
  `;
}

function More({known}) {
  const {effort, parent, config} = draft.value;
  const parents = known.filter((one) => one.parent !== null && !/@.*-/.test(one.id)).map((one) => one.id);
  if (parent && !parents.includes(parent)) parents.push(parent);
  return html`
    <details class="more" open=${Boolean(config || parent || effort !== 'normal')}>
      <summary>${text.teach.more}</summary>
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

function Plan({plan, body, missing, error, onPlanned}) {
  const now = useNow(plan.since !== null);
  const start = useAction();
  useEffect(() => {
    if (plan.plan) onPlanned();
  }, [plan.plan]);
  useEffect(start.clear, [plan.of]);
  const planned = plan.current && plan.plan !== null;
  const wait = planned ? null : missing ?? (error || plan.error ? text.teach.missing.invalid : text.teach.missing.plan);
  const begin = () =>
    start.run(async () => {
      const {job_id: id} = await post('/api/training/start', body);
      location.hash = `#/job/${id}`;
    });
  const refused = error ?? (plan.current ? plan.error : null);
  return html`
    <div role="status" aria-live="polite">
      ${missing && html`<p class="muted">${text.plan.empty}</p>`}
      ${!missing && !planned && !refused && plan.since !== null && html`
        <p class="muted">
          ${now - plan.since > 3 ? text.plan.planningLong : text.plan.planning} ${text.plan.seconds(Math.max(0, Math.round(now - plan.since)))}
        </p>
      `}
    </div>
    ${!missing && html`<${Problem} error=${refused} title=${text.plan.notReady} />`}
    ${plan.plan && !missing && html`<${Planned} plan=${plan.plan} stale=${!planned} />`}
    <${Problem} error=${start.error} />
    <div class="row">
      <button type="button" class="primary large" disabled=${wait !== null || start.busy} onClick=${begin}>
        ${start.busy ? text.teach.starting : wait ?? text.teach.start}
      </button>
    </div>
    ${body && html`<${Copies} body=${body} />`}
  `;
}

function Planned({plan, stale}) {
  const {computed: figures} = plan;
  return html`
    <div class=${stale ? 'planned stale' : 'planned'}>
      <dl class="tiles">
        <div><dt>${plan.objective === 'override' ? text.plan.stepsCap : text.plan.steps}</dt><dd>${number(figures.steps)}</dd></div>
        <div><dt>${text.plan.time}</dt><dd>${duration(figures.seconds)}</dd></div>
        <div><dt>${text.plan.memory}</dt><dd>${size(Math.max(figures.bytes, figures.exam_bytes ?? 0))}</dd></div>
      </dl>
      <dl class="lines">
        <div><dt>${text.plan.objective}</dt><dd>${text.plan.objectives[plan.objective] ?? plan.objective}</dd></div>
        <div>
          <dt>${text.plan.taught}</dt>
          <dd>${plan.objective === 'override' ? text.plan.rows(figures.rows) : text.plan.examples(figures.rows)}</dd>
        </div>
      </dl>
      <${Warnings} of=${plan.warnings} />
      <${Settings} plan=${plan} />
    </div>
  `;
}

function Copies({body}) {
  const [told, setTold] = useState('');
  const json = JSON.stringify(body, null, 2);
  const key = hasKey() ? ' -H "Authorization: Bearer $FORTWO_API_KEY"' : '';
  const curl = `curl ${location.origin}/api/training/start${key} -H 'Content-Type: application/json' -d '${json.replaceAll("'", "'\\''")}'`;
  const [open, setOpen] = useState(null);
  const copy = async (content) => {
    try {
      await navigator.clipboard.writeText(content);
      setTold(text.plan.copied);
      setOpen(null);
      setTimeout(() => setTold(''), 2000);
    } catch {
      setTold(text.plan.copyFailed);
      setOpen(content);
    }
  };
  return html`
    <div class="row copies">
      <button type="button" class="small" onClick=${() => copy(curl)}>${text.plan.curl}</button>
      <button type="button" class="small" onClick=${() => copy(json)}>${text.plan.json}</button>
      <span class="muted" role="status">${told}</span>
    </div>
    ${open && html`<pre tabindex="0">${open}</pre>`}
  `;
}
