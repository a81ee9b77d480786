/**
 * The conversation of Chat, which outlives a reload of the tab, and the requests that answer it.
 *
 * branches: lists of turns, of which `branch` is shown. A turn is {id, prompt, blind, order, vote, replies}. A reply is
 * {asked, model, fingerprint, checked, text, tokens, state, error}: model and fingerprint are what the server says has
 * answered, checked whether these are the weights that were asked, and state is waiting | streaming | done | stopped |
 * length | failed.
 */
import {effect, signal} from './vendor/signals.js';
import {get, stream} from './api.js';
import {text} from './text.js';

/** @typedef {import('../../../types/api').components['schemas']['ChatRequest']} ChatRequest */

const KEPT = 'fortwo.chat';
const SHOW_MS = 60; // words that arrive together are shown together
export const PROMPTED = 'prompted:'; // before the adapter whose facts the base has in its system prompt
export const BUSY = ['waiting', 'streaming'];

const EMPTY = {
  models: [], branches: [[]], branch: 0, system: '', temperature: '0', topP: '', seed: '', maxTokens: '256', surprise: false,
  blind: false,
};

export const chat = signal(restored());
effect(() => {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(chat.value));
  } catch {
    sessionStorage.removeItem(KEPT);
  }
});

/** What the tab remembers; what was being answered when it was reloaded is stopped. */
function restored() {
  const kept = {...EMPTY, ...JSON.parse(sessionStorage.getItem(KEPT) ?? '{}')};
  const ended = (reply) => (BUSY.includes(reply.state) ? {...reply, state: 'stopped'} : reply);
  const turn = (one) => ({...one, replies: one.replies.map(ended)});
  return {...kept, branches: kept.branches.map((turns) => turns.map(turn))};
}

export const set = (changes) => {
  chat.value = {...chat.value, ...changes};
};

export const turns = () => chat.value.branches[chat.value.branch];
export const isBusy = () => turns().some((turn) => turn.replies.some((reply) => BUSY.includes(reply.state)));

function setTurn(id, change) {
  const changed = (turn) => (turn.id === id ? change(turn) : turn);
  set({branches: chat.value.branches.map((list) => list.map(changed))});
}

const setReply = (id, column, changes) =>
  setTurn(id, (turn) => ({...turn, replies: turn.replies.map((one, place) => (place === column ? {...one, ...changes} : one))}));

let running = [];

export const stop = () => running.forEach((one) => one.abort());

export function clear() {
  stop();
  set({branches: [[]], branch: 0});
}

const fresh = (model) => ({asked: model, model: null, fingerprint: null, checked: null, text: '', tokens: [], state: 'waiting', error: null});

/** Adds a turn and asks all columns. */
export function ask(prompt) {
  const {models, blind, branches, branch} = chat.value;
  const hidden = blind && models.length === 2;
  const order = hidden && Math.random() < 0.5 ? [1, 0] : models.map((_, column) => column);
  const turn = {id: Date.now(), prompt, blind: hidden, order, vote: null, replies: models.map(fresh)};
  set({branches: branches.map((list, place) => (place === branch ? [...list, turn] : list))});
  turn.replies.forEach((_, column) => answer(turn, column));
}

/** Asks the last turn again. */
export function regenerate() {
  const {branches, branch} = chat.value;
  const {prompt} = turns().at(-1);
  set({branches: branches.map((list, place) => (place === branch ? list.slice(0, -1) : list))});
  ask(prompt);
}

/** Asks something else in place of a turn, in a branch of its own: the turns before it are the same. */
export function branchAt(id, prompt) {
  const {branches} = chat.value;
  const before = turns().slice(0, turns().findIndex((turn) => turn.id === id));
  set({branches: [...branches, before], branch: branches.length});
  ask(prompt);
}

/** choice: the column that is better, or -1 if none is. */
export const vote = (id, choice) => setTurn(id, (turn) => ({...turn, vote: choice}));

/** The votes of all blind turns: [[model, won], ...], and how many saw no difference. */
export function tally() {
  const seen = new Map(chat.value.branches.flat().map((turn) => [turn.id, turn]));
  const votes = [...seen.values()].filter((turn) => turn.blind && turn.vote !== null);
  const won = new Map();
  for (const turn of votes) {
    for (const reply of turn.replies) won.set(reply.asked, won.get(reply.asked) ?? 0);
    if (turn.vote >= 0) won.set(turn.replies[turn.vote].asked, won.get(turn.replies[turn.vote].asked) + 1);
  }
  return {won: [...won], even: votes.filter((turn) => turn.vote < 0).length, count: votes.length};
}

/** What the column was asked and said before a turn. */
function messagesBefore(turn, column) {
  const messages = [];
  for (const one of turns()) {
    if (one.id === turn.id) break;
    const reply = one.replies[column];
    if (reply?.text) messages.push({role: 'user', content: one.prompt}, {role: 'assistant', content: reply.text});
  }
  return messages;
}

/**
 * What is asked for a column: {model, digest, stated}. An adapter's name means its current version: asked for by that, so
 * that the reply says which version it was. digest: of the weights that should answer, null where it is not known.
 * stated: the facts that the system prompt states.
 */
async function meant(asked) {
  if (asked.startsWith(PROMPTED)) {
    const {manifest} = await get(`/api/adapters/${asked.slice(PROMPTED.length)}`);
    const stated = (manifest.facts ?? []).map((fact) => fact.answer).join('\n');
    return {...(await meant(manifest.base_model)), stated};
  }
  const [{adapters}, {models}] = await Promise.all([get('/api/adapters'), get('/api/models')]);
  const version = adapters.find((one) => `${one.name}@${one.version}` === asked || (one.name === asked && one.current));
  if (version) return {model: `${version.name}@${version.version}`, digest: version.digest};
  return {model: asked, digest: models.find((one) => one.id === asked)?.digest ?? null};
}

/** The server's system_fingerprint is the beginning of the digest of the weights that answered. */
const isOf = (fingerprint, digest) => digest.startsWith(fingerprint.replace(/^fp_/, ''));

function sampling() {
  const {temperature, topP, seed, maxTokens, surprise} = chat.value;
  const given = {temperature, top_p: topP, seed, max_tokens: maxTokens};
  const numbers = Object.entries(given).filter(([, value]) => value !== '').map(([name, value]) => [name, Number(value)]);
  return {...Object.fromEntries(numbers), ...(surprise ? {logprobs: true} : {})};
}

const textOf = ({token, bytes}, characters) => (bytes ? characters.decode(new Uint8Array(bytes), {stream: true}) : token);

async function answer(turn, column) {
  const abort = new AbortController();
  running.push(abort);
  const {asked} = turn.replies[column];
  let said = '';
  let tokens = [];
  const characters = new TextDecoder(); // a token may end within one
  let shownAt = 0;
  try {
    const {model, digest, stated} = await meant(asked);
    const system = [stated && `${text.chat.factsStated}\n${stated}`, chat.value.system.trim()].filter(Boolean).join('\n\n');
    const first = system ? [{role: 'system', content: system}] : [];
    const messages = [...first, ...messagesBefore(turn, column), {role: 'user', content: turn.prompt}];
    /** @type {ChatRequest} */
    const body = {model, messages, stream: true, ...sampling()};
    let end = 'done';
    let who = {};
    for await (const {data} of stream('/v1/chat/completions', {method: 'POST', body, abort: abort.signal})) {
      if (data === '[DONE]') break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw chunk.error;
      const [choice] = chunk.choices;
      said += choice?.delta?.content ?? '';
      tokens = [...tokens, ...(choice?.logprobs?.content ?? []).map((one) => [textOf(one, characters), one.logprob])];
      if (choice?.finish_reason === 'length') end = 'length';
      const fingerprint = chunk.system_fingerprint ?? null;
      const checked = digest && fingerprint ? isOf(fingerprint, digest) : null;
      who = {model: chunk.model, fingerprint, checked, stated: Boolean(stated)};
      if (Date.now() - shownAt > SHOW_MS) {
        setReply(turn.id, column, {text: said, tokens, ...who, state: said ? 'streaming' : 'waiting'});
        shownAt = Date.now();
      }
    }
    setReply(turn.id, column, {text: said, tokens, ...who, state: end});
  } catch (error) {
    const stopped = abort.signal.aborted;
    const {message, hint} = /** @type {{message: string, hint?: string}} */ (error);
    const told = {message, hint};
    setReply(turn.id, column, {text: said, tokens, ...(stopped ? {state: 'stopped'} : {state: 'failed', error: told})});
  } finally {
    running = running.filter((one) => one !== abort);
  }
}

/** The branch that is shown, as a file: {name, type, content}. */
export function exported(form) {
  const {models, system} = chat.value;
  if (form === 'json') {
    const conversations = models.map((model, column) => ({
      model,
      messages: [
        ...(system.trim() ? [{role: 'system', content: system}] : []),
        ...turns().flatMap((turn) => [
          {role: 'user', content: turn.prompt},
          {role: 'assistant', content: turn.replies[column]?.text ?? '', model: turn.replies[column]?.model},
        ]),
      ],
    }));
    return {name: 'chat.json', type: 'application/json', content: JSON.stringify(conversations, null, 2)};
  }
  const content = turns()
    .map((turn) => [`## ${turn.prompt}`, ...turn.replies.map((reply) => `**${reply.model ?? reply.asked}**\n\n${reply.text}`)].join('\n\n'))
    .join('\n\n');
  return {name: 'chat.md', type: 'text/markdown', content: `${content}\n`};
}
