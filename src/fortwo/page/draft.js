/** What is being taught: the form as it is typed, which outlives a reload of the tab, and the request it makes. */
import {computed, effect, signal} from './vendor/signals.js';
import {text} from './text.js';

/** @typedef {import('../../../types/api').components['schemas']['TrainingRequest']} TrainingRequest */
/** @typedef {{line: number | null, message: string, hint: string}} Finding */

const KEPT = 'fortwo.draft';
const FACT_KEYS = ['subject', 'answer', 'match', 'questions', 'aliases'];
const COLUMN_ROWS = 50; // whose keys are the columns

/**
 * columns: the key for each column, null for the user's not having been asked. guessed: what the server suggested.
 * source: {hub} or {file_id} of an earlier job, if no rows are typed.
 */
/** @type {Record<string, any>} */
export const EMPTY = {
  tab: 'fact', name: '', model: '', subject: '', aliases: '', answer: '', match: '', questions: '', rows: '', path: '', source: null,
  columns: null, guessed: null, effort: 'normal', parent: '', config: '', changes: [],
};

export const draft = signal({...EMPTY, ...JSON.parse(sessionStorage.getItem(KEPT) ?? '{}')});
effect(() => {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(draft.value));
  } catch {
    sessionStorage.removeItem(KEPT); // large rows do not fit; they are lost on a reload
  }
});

export const set = (changes) => {
  draft.value = {...draft.value, ...changes};
};

/** Another view's way here: the question is filled in. */
export function teachAnswerTo(question) {
  set({...EMPTY, model: draft.value.model, questions: question});
  location.hash = '#/teach';
}

/** Another view's way here: the request of a job is filled in. changes: how it differs from that job's. */
export function teachAgain({model, adapter_name: name, dataset, effort, parent, ...more}, changes = []) {
  const [fact] = dataset.facts ?? [];
  const simple = dataset.facts?.length === 1 && Object.keys(fact).every((key) => FACT_KEYS.includes(key));
  const rows = (dataset.facts ?? dataset.examples ?? []).map((row) => JSON.stringify(row)).join('\n');
  const given = simple
    ? {tab: 'fact', ...Object.fromEntries(FACT_KEYS.map((key) => [key, [fact[key] ?? ''].flat().join('\n')]))}
    : {tab: 'rows', rows, path: dataset.path ?? '', source: stored(dataset), columns: dataset.columns ?? null};
  const config = Object.keys(more).length ? JSON.stringify(more, null, 2) : '';
  set({...EMPTY, ...given, name, model, effort: effort ?? 'normal', parent: parent ?? '', config, changes});
  location.hash = '#/teach';
}

const stored = ({hub, file_id: id}) => (hub ? {hub} : id ? {file_id: id} : null);

export const lines = (typed) => typed.split('\n').map((line) => line.trim()).filter(Boolean);
export const slug = (name) =>
  name.replace(/[^A-Za-z0-9._-]+/g, '-').replace(/^[^A-Za-z0-9]+|-+$/g, '').slice(0, 60).toLowerCase();

/**
 * Rows as typed or dropped. lines: the line of each row, null for a JSON list. problems: of lines that are not JSON.
 * @param {string} typed
 * @returns {{rows: any[], lines: number[] | null, problems: Finding[]}}
 */
function parseRows(typed) {
  try {
    const whole = JSON.parse(typed);
    return {rows: Array.isArray(whole) ? whole : [whole], lines: null, problems: []};
  } catch (problem) {
    if (typed.trimStart().startsWith('[')) return {rows: [], lines: null, problems: [notJson(null, problem)]};
  }
  /** @type {{rows: any[], lines: number[], problems: Finding[]}} */
  const found = {rows: [], lines: [], problems: []};
  for (const [place, line] of typed.split('\n').entries()) {
    if (!line.trim()) continue;
    try {
      found.rows.push(JSON.parse(line));
      found.lines.push(place + 1);
    } catch (problem) {
      found.problems.push(notJson(place + 1, problem));
    }
  }
  return found;
}

const notJson = (line, problem) => ({
  line,
  message: text.teach.notJson(line, problem.message),
  hint: text.teach.notJsonHint,
});

export const parsed = computed(() => parseRows(draft.value.rows));

/** The names of the columns of the rows that are typed. */
export const columnNames = computed(() => {
  const names = parsed.value.rows.slice(0, COLUMN_ROWS).filter((row) => row !== null && typeof row === 'object');
  return [...new Set(names.flatMap(Object.keys))];
});

export const adapterName = computed(
  () => draft.value.name.trim() || slug(draft.value.subject) || (draft.value.tab === 'rows' ? 'my-adapter' : ''),
);

/** How many settings of the advanced part are not those that the plan would choose. */
export const changed = computed(() => {
  const {effort, parent} = draft.value;
  const {lora_config: lora = {}, training_config: training = {}, ...others} = config.value.given ?? {};
  const own = Object.keys(lora).length + Object.keys(training).length + Object.keys(others).length;
  return own + (effort === 'normal' ? 0 : 1) + (parent ? 1 : 0);
});

/** The configuration that is typed: {given} or {error}. */
const config = computed(() => {
  const typed = draft.value.config;
  if (!typed.trim()) return {given: {}};
  try {
    const given = JSON.parse(typed);
    if (given === null || typeof given !== 'object' || Array.isArray(given)) {
      return {error: {message: text.teach.configNotObject, hint: text.teach.configNotObjectHint}};
    }
    return {given};
  } catch (problem) {
    return {error: notJson(null, problem)};
  }
});

/** @typedef {{dataset?: any, missing?: string, error?: {message: string, hint: string}}} Source */

/** The fact that is typed: {dataset} or {missing}. */
const fact = computed(/** @returns {Source} */ () => {
  const {subject, aliases, answer, match, questions} = draft.value;
  const {missing} = text.teach;
  if (!subject.trim()) return {missing: missing.subject};
  if (!answer.trim()) return {missing: missing.answer};
  if (!lines(match).length) return {missing: missing.match};
  if (!lines(questions).length) return {missing: missing.questions};
  /** @type {Record<string, unknown>} */
  const one = {subject: subject.trim(), answer: answer.trim(), match: lines(match), questions: lines(questions)};
  if (lines(aliases).length) one.aliases = lines(aliases);
  return {dataset: {facts: [one]}};
});

/** The rows that are typed, or the path: {dataset}, {missing} or {error}. */
const rows = computed(/** @returns {Source} */ () => {
  const {rows: typed, path, source, columns} = draft.value;
  if (!typed.trim() && path.trim()) return {dataset: renaming({path: path.trim()}, columns ?? {})};
  if (!typed.trim() && source) return {dataset: renaming(source, columns ?? {})};
  if (!typed.trim()) return {missing: text.teach.missing.rows};
  const {rows: found, problems} = parsed.value;
  if (problems.length) return {error: problems[0]};
  const facts = found.some((row) => row !== null && typeof row === 'object' && 'subject' in row);
  const own = Object.entries(columns ?? {}).filter(([name]) => columnNames.value.includes(name));
  return {dataset: renaming(facts ? {facts: found} : {examples: found}, Object.fromEntries(own))};
});

const renaming = (dataset, columns) => (Object.keys(columns).length ? {...dataset, columns} : dataset);

/** Of the draft: {body} to be sent, {missing} what is not given yet, or {error}. */
export const request = computed(() => {
  const {tab, model, effort, parent} = draft.value;
  if (!model) return {missing: text.teach.missing.plan};
  const {dataset, missing, error} = tab === 'fact' ? fact.value : rows.value;
  if (missing) return {missing};
  if (error ?? config.value.error) return {error: error ?? config.value.error};
  /** @type {Partial<TrainingRequest>} */
  const body = {model, adapter_name: adapterName.value, dataset};
  if (effort !== 'normal') body.effort = effort;
  if (parent) body.parent = parent;
  return {body: {...config.value.given, ...body}};
});

/** The rows under the names that `columns` gives, as the server renames them. */
export function renamed({columns, ...dataset}) {
  if (!columns) return dataset;
  const [[kind, found]] = Object.entries(dataset);
  const kept = (name) => columns[name] !== null;
  const row = (one) => Object.fromEntries(Object.entries(one).filter(([name]) => kept(name)).map(([name, value]) => [columns[name] ?? name, value]));
  return {[kind]: found.map(row)};
}
