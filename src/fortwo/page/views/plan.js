/** The plan beside the form of Teach: what would be done, why it cannot be done yet, and the request for elsewhere. */
import {hasKey, newKey, post} from '../api.js';
import {renamed} from '../draft.js';
import {Problem, Settings, Warnings, duration, html, number, size, useAction, useEffect, useNow, useRef, useState} from '../parts.js';
import {text} from '../text.js';

const TYPING_MS = 600;

/**
 * The plan of the newest request. One is asked for at a time: what is typed meanwhile is planned behind it.
 * Gives {planning since when, of: the body planned, plan, error}.
 */
export function usePlan(body, allowed) {
  const nothing = {since: null, of: null, plan: null, error: null};
  const [state, setState] = useState(/** @type {{since: number | null, of: string | null, plan: any, error: any}} */ (nothing));
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

export function Plan({plan, body, missing, error, onPlanned}) {
  const now = useNow(plan.since !== null);
  const start = useAction();
  const key = useRef({of: '', key: ''}); // a start that is sent twice makes one job
  useEffect(() => {
    if (plan.plan) onPlanned();
  }, [plan.plan]);
  useEffect(start.clear, [plan.of]);
  const planned = plan.current && plan.plan !== null;
  const wait = planned ? null : missing ?? (error || plan.error ? text.teach.missing.invalid : text.teach.missing.plan);
  const begin = () =>
    start.run(async () => {
      if (key.current.of !== plan.of) key.current = {of: plan.of, key: newKey()};
      const {job_id: id} = await post('/api/training/start', body, undefined, {'Idempotency-Key': key.current.key});
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
        <div><dt>${text.plan.download}</dt><dd>${text.plan.downloadNone}</dd></div>
      </dl>
      <${Warnings} of=${plan.warnings} />
      <${Settings} plan=${plan} />
    </div>
  `;
}

const quoted = (word) => (/^[\w./@:-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
const here = (name, content) => `cat > ${name} <<'END'\n${content}\nEND\n`;

function asCurl(body) {
  const key = hasKey() ? ' -H "Authorization: Bearer $FORTWO_API_KEY"' : '';
  const data = quoted(JSON.stringify(body, null, 2));
  return `curl ${location.origin}/api/training/start${key} -H 'Content-Type: application/json' -d ${data}`;
}

/** The same as commands; null for an uploaded file and for renamed columns of a file: the command line knows neither. */
export function asCommands({model, adapter_name: name, dataset, effort, parent, ...config}) {
  const given = dataset.path ?? (dataset.hub && `hub:${dataset.hub}`);
  if (dataset.file_id || (given && dataset.columns)) return null;
  const file = given ?? `${name}.jsonl`;
  const written = Object.keys(config).length > 0;
  const options = {'--name': name, '--model': model, '--onto': parent, '--effort': effort, '--config': written ? `${name}.config.json` : undefined};
  const words = Object.entries(options).filter(([, value]) => value !== undefined);
  return [
    given ? '' : here(quoted(file), Object.values(renamed(dataset))[0].map((row) => JSON.stringify(row)).join('\n')),
    written ? here(quoted(options['--config']), JSON.stringify(config, null, 2)) : '',
    ['fortwo teach', quoted(file), ...words.map(([option, value]) => `${option} ${quoted(value)}`)].join(' '),
  ].join('');
}

function Copies({body}) {
  const [told, setTold] = useState('');
  const [open, setOpen] = useState(null);
  const copy = async (content) => {
    try {
      await navigator.clipboard.writeText(content);
      setTold(text.plan.copied);
      setOpen(null);
    } catch {
      setTold(text.plan.copyFailed);
      setOpen(content);
    }
  };
  const commands = asCommands(body);
  return html`
    <div class="row copies">
      <button type="button" class="small" onClick=${() => copy(asCurl(body))}>${text.plan.curl}</button>
      ${commands && html`<button type="button" class="small" onClick=${() => copy(commands)}>${text.plan.cli}</button>`}
      <button type="button" class="small" onClick=${() => copy(JSON.stringify(body, null, 2))}>${text.plan.json}</button>
      <span class="muted" role="status">${told}</span>
    </div>
    ${open && html`<pre tabindex="0">${open}</pre>`}
  `;
}
