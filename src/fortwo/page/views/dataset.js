/** The tab of Teach for rows of data: a file, its columns, what is wrong with it by line, and what is learned of it. */
import {post, upload} from '../api.js';
import {columnNames, draft, parsed, request, set, slug} from '../draft.js';
import {Problem, html, useAction, useEffect, useState} from '../parts.js';
import {text} from '../text.js';

const TYPING_MS = 600;
const LARGEST_FILE = 20e6;
const READ_BY_SERVER = /\.(csv|tsv|parquet)$/i;
const KEYS = [
  'prompt', 'completion', 'messages', 'conversations', 'text', 'instruction', 'input', 'output', 'chosen', 'rejected',
  'label', 'tools',
];
const LEFT_OUT = '-';

/** base: the base model that is chosen, undefined while there is none. */
export function Rows({base, Box}) {
  const reading = useAction();
  const {rows, path, source} = draft.value;
  const {body} = request.value;
  const typed = rows.trim() || path.trim();
  const found = useInspection(typed || source ? body?.dataset : undefined);
  useEffect(() => {
    if (found && draft.value.columns === null && Object.keys(found.suggested).length) {
      set({columns: found.suggested, guessed: found.suggested});
    }
  }, [found]);
  const take = (file) => file && reading.run(() => read(file));
  return html`
    <${Drop} take=${take} busy=${reading.busy} />
    <${Problem} error=${reading.error} />
    <${Box} name="rows" rows=${8} />
    ${!rows.trim() && html`<${Box} name="path" />`}
    ${!typed && source && html`<p class="found">${text.teach.source(source.hub ?? source.file_id)}</p>`}
    <${Findings} found=${found} />
    <${Columns} />
    ${body?.dataset.examples && base && base.state !== 'not fetched' && html`
      <${Preview} dataset=${JSON.stringify({...body.dataset, examples: body.dataset.examples.slice(0, 3)})} model=${base.id} />
    `}
  `;
}

/** Puts the rows of a file into the form. Throws what is wrong with it. */
async function read(file) {
  if (file.size > LARGEST_FILE) throw {message: text.teach.fileTooLarge(file.name), hint: text.teach.fileTooLargeHint};
  const name = draft.value.name || slug(file.name.replace(/\.[a-z]+$/i, ''));
  let rows;
  if (READ_BY_SERVER.test(file.name)) {
    rows = (await upload('/api/data/rows', file)).rows.map((row) => JSON.stringify(row)).join('\n');
  } else {
    const content = await file.text();
    const paragraphs = file.name.endsWith('.txt') && content.split(/\n\s*\n/).filter((one) => one.trim());
    rows = paragraphs ? paragraphs.map((one) => JSON.stringify({text: one.trim()})).join('\n') : content;
  }
  set({name, rows, columns: null, guessed: null});
}

function Drop({take, busy}) {
  const [over, setOver] = useState(false);
  const dragged = (inside) => (event) => {
    event.preventDefault();
    setOver(inside);
  };
  return html`
    <div class=${over ? 'drop over' : 'drop'} onDragOver=${dragged(true)} onDragLeave=${dragged(false)}
      onDrop=${(event) => {
        dragged(false)(event);
        take(event.dataTransfer.files[0]);
      }}>
      <span>${busy ? text.teach.reading : text.teach.drop}</span>
      <label class="button" for="file">${text.teach.choose}</label>
      <input id="file" class="hidden" type="file" accept=".json,.jsonl,.txt,.csv,.tsv,.parquet" onChange=${(event) => {
        take(event.target.files[0]);
        event.target.value = '';
      }} />
    </div>
  `;
}

/** What the server finds in the dataset, null until it has answered. */
function useInspection(dataset) {
  const [found, setFound] = useState(/** @type {{of: string | null, told: any}} */ ({of: null, told: null}));
  const wanted = dataset === undefined ? null : JSON.stringify(dataset);
  useEffect(() => {
    if (wanted === null) return undefined;
    const abort = new AbortController();
    const ask = () =>
      post('/api/data/inspect', {dataset: JSON.parse(wanted)}, abort.signal).then(
        (told) => setFound({of: wanted, told}),
        () => setFound({of: wanted, told: null}), // the plan says what is wrong
      );
    const timer = setTimeout(ask, TYPING_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [wanted]);
  return found.of === wanted ? found.told : null;
}

/** What is wrong, by line; the lines of the text box for rows that are typed one a line. */
function Findings({found}) {
  const {rows, lines, problems: unread} = parsed.value;
  const lineOf = (row) => (rows.length && lines ? lines[row - 1] : row);
  const problems = [...unread, ...(found?.problems ?? []).map((one) => ({...one, line: lineOf(one.line), lines: one.lines.map(lineOf)}))];
  return html`
    ${found && html`
      <p class="found" role="status">
        ${text.teach.rowsFound(found.rows)} ${found.content ? html`<span class="chip">${found.content}</span>` : text.teach.unknownFormat}
      </p>
    `}
    ${problems.length > 0 && html`
      <ul class="findings" aria-label=${text.teach.findings}>
        ${problems.map(
          (one, place) => html`
            <li class="problem" key=${place}>
              <p class="message">
                ${one.line !== null && html`
                  <button type="button" class="small" onClick=${() => showLine(one.line)}>${text.teach.line(one.line)}</button>${' '}
                `}
                ${one.message}
              </p>
              ${one.rows > 1 && html`<p class="muted">${text.teach.likewise(one.lines, one.rows - 1)}</p>`}
              <p class="hint">${one.hint}</p>
            </li>
          `,
        )}
      </ul>
    `}
  `;
}

/** Selects a line of the text box. */
function showLine(line) {
  const box = /** @type {HTMLTextAreaElement} */ (document.getElementById('rows'));
  const before = box.value.split('\n').slice(0, line - 1).join('\n');
  const begin = before.length + (line > 1 ? 1 : 0);
  const end = box.value.indexOf('\n', begin);
  box.focus();
  box.setSelectionRange(begin, end < 0 ? box.value.length : end);
}

/** The key of each column, as it is, as it was guessed, or as the user says. */
function Columns() {
  const {columns, guessed} = draft.value;
  const names = columnNames.value;
  if (!names.length) return null;
  const choose = (name, key) => {
    const {[name]: _, ...others} = columns ?? {};
    const chosen = key === name ? {} : {[name]: key === LEFT_OUT ? null : key};
    set({columns: {...others, ...chosen}});
  };
  const keyOf = (name) => (columns && name in columns ? columns[name] ?? LEFT_OUT : name);
  return html`
    <details class="columns" open=${guessed !== null}>
      <summary>${text.teach.columns(names.length)}</summary>
      ${guessed && html`<p class="help">${text.teach.columnsGuessed}</p>`}
      ${names.map(
        (name) => html`
          <div class="column" key=${name}>
            <label for=${`column-${name}`}>${name}</label>
            <select id=${`column-${name}`} value=${keyOf(name)} onChange=${(event) => choose(name, event.target.value)}>
              ${[...new Set([name, ...KEYS])].map((key) => html`<option key=${key} value=${key}>${key}</option>`)}
              <option value=${LEFT_OUT}>${text.teach.leftOut}</option>
            </select>
            <span class="muted">${guessed && name in guessed && (guessed[name] ?? LEFT_OUT) === keyOf(name) ? text.teach.guessed : ''}</span>
          </div>
        `,
      )}
    </details>
  `;
}

/** The first rows with what is learned of them; what is wrong with them is told above. */
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
