/** The public HTTP API and its event streams. Nothing else of the page talks to the server. */
import {signal} from './vendor/signals.js';
import {text} from './text.js';

const KEY = 'fortwo.key';
const RETRY_MS = 1000;
const HEARTBEAT_MS = 15000;

/** Whether the server answered the last time it was asked. */
export const connected = signal(true);
/** Grows when what is shown has to be asked for again: the connection is back, or there is a key. */
export const epoch = signal(0);
/** Whether the server asks for a key that we do not have. */
export const keyNeeded = signal(false);

let key = sessionStorage.getItem(KEY) ?? '';

export class ApiError extends Error {
  /**
   * @param {number} status 0 when no answer came
   * @param {{message: string, code?: string, param?: string | null, hint?: string}} body as the API tells it
   */
  constructor(status, {message, code, param, hint}) {
    super(message);
    Object.assign(this, {status, code, param, hint});
  }
}

export const hasKey = () => key !== '';

/** Takes the key if the server accepts it, else throws its ApiError. */
export async function setKey(given) {
  const before = key;
  key = given.trim();
  try {
    await send('/v1/models');
  } catch (error) {
    key = before;
    throw error;
  }
  sessionStorage.setItem(KEY, key);
  keyNeeded.value = false;
  epoch.value += 1;
}

/**
 * The response, if it is a good one. Throws ApiError; an AbortError passes.
 * @param {string} path
 * @param {{method?: string, body?: unknown, headers?: Record<string, string>, abort?: AbortSignal}} options
 *   body: FormData, or what is sent as JSON.
 */
async function send(path, {method = 'GET', body, headers = {}, abort} = {}) {
  /** @type {Record<string, string>} */
  const sent = {...headers};
  const form = body instanceof FormData;
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined && !form) sent['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: sent,
      body: body instanceof FormData || body === undefined ? body : JSON.stringify(body),
      signal: abort,
    });
  } catch (error) {
    if (error instanceof Error && error.name === 'AbortError') throw error;
    throw lost();
  }
  if (response.ok) return response;
  if (response.status === 401) keyNeeded.value = true;
  const told = await response.json().catch(() => null);
  throw new ApiError(response.status, told?.error ?? {message: text.errors.status(response.status)});
}

export async function get(path, abort) {
  return (await send(path, {abort})).json();
}

/**
 * @param {string} path
 * @param {unknown} [body]
 * @param {AbortSignal} [abort]
 * @param {Record<string, string>} [headers] besides those that every request has
 */
export async function post(path, body, abort, headers) {
  return (await send(path, {method: 'POST', body, abort, headers})).json();
}

export async function put(path) {
  return (await send(path, {method: 'PUT'})).json();
}

export async function remove(path) {
  return (await send(path, {method: 'DELETE'})).json();
}

/** POST of one file as a form, with the other fields. */
export async function upload(path, file, fields = {}) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append('file', file, file.name);
  return post(path, form);
}

/** What POST path answers, as text. */
export async function postForText(path, body) {
  return (await send(path, {method: 'POST', body})).text();
}

/** Gives the browser a file of the server to save. With a key it passes through memory: a link cannot send the key. */
export async function fileFrom(path, name) {
  const link = document.createElement('a');
  link.download = name;
  link.href = key ? URL.createObjectURL(await (await send(path)).blob()) : path;
  link.click();
  if (key) setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A new key by which the server knows a request that is sent twice. */
export function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/**
 * Server-sent events as {id, event, data}, data as text. Throws ApiError, also when the connection breaks.
 * @param {string} path
 * @param {{method?: string, body?: unknown, headers?: Record<string, string>, abort?: AbortSignal}} [options]
 */
export async function* stream(path, options) {
  const response = await send(path, options);
  if (response.status === 204) return;
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  /** @type {Record<string, string>} */
  let event = {};
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (options?.abort?.aborted) throw error;
      throw lost();
    }
    if (part.done) return;
    const lines = (rest + part.value).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines.map((one) => one.replace(/\r$/, ''))) {
      if (line === '') {
        if (event.data !== undefined) yield event;
        event = {};
      } else if (!line.startsWith(':')) {
        const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line) ?? [];
        event[name] = name === 'data' && event.data !== undefined ? `${event.data}\n${value}` : value;
      }
    }
  }
}

/** Says that the server does not answer, and asks it until it does. */
function lost() {
  if (connected.value) {
    connected.value = false;
    setTimeout(ask, RETRY_MS);
  }
  return new ApiError(0, {message: text.errors.unreachable, hint: text.errors.unreachableHint});
}

async function ask() {
  const back = await fetch('/healthz').then((response) => response.ok, () => false);
  if (!back) {
    setTimeout(ask, RETRY_MS);
    return;
  }
  connected.value = true;
  epoch.value += 1;
}

/** Notices a lost connection while nobody clicks. A hidden page asks nothing. */
export function watchConnection() {
  setInterval(() => {
    if (connected.value && document.visibilityState === 'visible') send('/healthz').catch(() => {});
  }, HEARTBEAT_MS);
}
