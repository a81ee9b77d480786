/** An adapter for another program: how large it will be, how far the export is, and the files to download. */
import {connected, epoch, fileFrom, get, post, remove, stream} from '../api.js';
import {Field, Problem, html, share, size, useAction, useEffect, useState} from '../parts.js';
import {metricName} from '../report.js';
import {text} from '../text.js';

const FORMS = ['peft', 'merged', 'gguf-lora', 'gguf', 'ollama', 'mlx', 'vllm'];
const QUANTISED = ['gguf', 'ollama'];
const QUANTIZATIONS = ['F16', 'Q8_0', 'Q6_K', 'Q5_K_M', 'Q4_K_M'];
const ENDED = ['succeeded', 'failed', 'cancelled'];

const refOf = (one) => `${one.name}@${one.version}`;

/** versions: of the adapter `name`, oldest first. */
export function Exports({name, versions}) {
  const [open, setOpen] = useState(false);
  return html`
    <details class="exports" onToggle=${(event) => setOpen(event.target.open)}>
      <summary>${text.exports.title}</summary>
      ${open && html`<${Form} name=${name} versions=${versions} />`}
    </details>
  `;
}

function Form({name, versions}) {
  const [ref, setRef] = useState(refOf(versions.find((one) => one.current) ?? versions.at(-1)));
  const [to, setTo] = useState('peft');
  const [quantization, setQuantization] = useState('Q8_0');
  const [exam, setExam] = useState(true);
  const [listed, setListed] = useState(/** @type {any[]} */ ([]));
  const action = useAction();
  const back = epoch.value;
  const reload = () => get('/api/exports').then((body) => setListed(body.exports.filter((one) => one.adapter.startsWith(`${name}@`))));
  useEffect(() => {
    action.run(reload);
  }, [back]);
  const body = {to, ...(QUANTISED.includes(to) ? {quantization} : {})};
  const begin = (event) => {
    event.preventDefault();
    action.run(async () => {
      await post(`/api/adapters/${ref}/export`, {...body, exam});
      await reload();
    });
  };
  return html`
    <form onSubmit=${begin}>
      <div class="pair">
        <${Field} id=${`export-version-${name}`} label=${text.adapters.version}>
          ${(about) => html`<select ...${about} value=${ref} onChange=${(event) => setRef(event.target.value)}>
            ${versions.map(refOf).map((one) => html`<option key=${one} value=${one}>${one}</option>`)}</select>`}
        <//>
        <${Field} id=${`export-to-${name}`} label=${text.exports.to}>
          ${(about) => html`<select ...${about} value=${to} onChange=${(event) => setTo(event.target.value)}>
            ${FORMS.map((one) => html`<option key=${one} value=${one}>${text.exports.forms[one]}</option>`)}</select>`}
        <//>
        ${QUANTISED.includes(to) && html`
          <${Field} id=${`export-quantization-${name}`} label=${text.exports.quantization}>
            ${(about) => html`<select ...${about} value=${quantization} onChange=${(event) => setQuantization(event.target.value)}>
              ${QUANTIZATIONS.map((one) => html`<option key=${one} value=${one}>${one}</option>`)}</select>`}
          <//>
        `}
      </div>
      <label class="check">
        <input type="checkbox" checked=${exam} onChange=${(event) => setExam(event.target.checked)} /> ${text.exports.exam}
      </label>
      <${Estimate} of=${ref} body=${JSON.stringify(body)} />
      <${Problem} error=${action.error} />
      <div class="row"><button disabled=${action.busy}>${text.exports.submit}<span class="hidden"> ${ref}</span></button></div>
    </form>
    <ul class="exported">
      ${listed.map((one) => html`<${Export} key=${one.export_id} first=${one} reload=${reload} />`)}
    </ul>
  `;
}

/** How large the export will be, before it is begun. */
function Estimate({of, body}) {
  const [plan, setPlan] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    const abort = new AbortController();
    setPlan(null);
    post(`/api/adapters/${of}/export/plan`, JSON.parse(body), abort.signal).then(
      (told) => {
        setPlan(told);
        setError(null);
      },
      (problem) => problem.name !== 'AbortError' && setError(problem),
    );
    return () => abort.abort();
  }, [of, body]);
  if (error) return html`<${Problem} error=${error} />`;
  if (!plan) return html`<p class="muted" role="status">${text.loading}</p>`;
  return html`
    <p class="estimate">${text.exports.estimate(size(plan.estimated_bytes), size(plan.free_bytes))}</p>
    ${plan.exam && html`<p class="muted">${plan.exam}</p>`}
  `;
}

/** One export, followed until it has ended. */
function Export({first, reload}) {
  const [one, setOne] = useState(first);
  const action = useAction();
  const back = epoch.value;
  useEffect(() => {
    if (ENDED.includes(first.status)) return undefined;
    const abort = new AbortController();
    const follow = async () => {
      for await (const event of stream(`/api/exports/${first.export_id}/events`, {abort: abort.signal})) {
        if (event.event === 'export') setOne(JSON.parse(event.data));
      }
    };
    follow().catch((error) => {
      if (!abort.signal.aborted && connected.value) action.run(() => Promise.reject(error));
    });
    return () => abort.abort();
  }, [first.export_id, back]);
  const ended = ENDED.includes(one.status);
  const base = `/api/exports/${one.export_id}`;
  const act = (what) => action.run(async () => {
    await what();
    await reload();
  });
  const archive = () => action.run(() => fileFrom(`${base}/archive`, `${one.adapter.replace('@', '-')}-${one.to}.tar`));
  return html`
    <li>
      <div class="heading">
        <strong>${one.adapter}</strong>
        <span>${text.exports.forms[one.to] ?? one.to} ${one.quantization}</span>
        <span class=${`chip ${one.status}`}>${text.status[one.status] ?? one.status}</span>
        <span class="grow"></span>
        ${one.status === 'succeeded' && html`
          <button type="button" class="small primary" onClick=${archive}>
            ${text.exports.download(size(one.files.reduce((sum, file) => sum + file.bytes, 0)))}
          </button>
        `}
        <button type="button" class="small danger quiet" disabled=${action.busy}
          onClick=${() => act(() => (ended ? remove(base) : post(`${base}/cancel`)))}>
          ${ended ? text.exports.remove : text.job.cancel}<span class="hidden"> ${one.adapter} ${one.to}</span>
        </button>
      </div>
      ${one.progress && html`
        <p class="muted" role="status">${one.progress.label}</p>
        <progress max=${one.progress.total || 1} value=${one.progress.done} aria-label=${one.progress.label}></progress>
      `}
      <${Problem} error=${one.error ?? action.error} />
      ${one.exam && html`
        <p>${text.exports.examined}: ${Object.entries(one.exam).map(([metric, found]) => `${metricName(metric)} ${share(found.exported?.value)}`).join(', ')}</p>`}
      ${one.notes.map((note) => html`<p class="muted" key=${note}>${note}</p>`)}
    </li>
  `;
}
