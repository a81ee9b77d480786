/** Chat: one prompt, answered by one or two models side by side. */
import {effect, signal} from '../vendor/signals.js';
import {get, stream} from '../api.js';
import {Markdown} from '../markdown.js';
import {Empty, Field, Problem, html, useData, useEffect, useRef, useState} from '../parts.js';
import {text} from '../text.js';
import {teachAnswerTo} from '../draft.js';

const KEPT = 'fortwo.chat';
const SHOW_MS = 60; // words that arrive together are shown together

/**
 * models: one or two columns. turns: {id, prompt, replies: one for each column {model, text, state, error}}, where model
 * is what answered, and state is waiting | streaming | done | stopped | length | failed.
 */
const EMPTY = {models: [], turns: [], system: '', temperature: '0', maxTokens: '256'};
const chat = signal({...EMPTY, ...JSON.parse(sessionStorage.getItem(KEPT) ?? '{}')});
const BUSY = ['waiting', 'streaming'];
chat.value = {
  ...chat.value,
  turns: chat.value.turns.map((turn) => ({
    ...turn,
    replies: turn.replies.map((reply) => (BUSY.includes(reply.state) ? {...reply, state: 'stopped'} : reply)),
  })),
};
effect(() => {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(chat.value));
  } catch {
    sessionStorage.removeItem(KEPT);
  }
});

let running = [];

const set = (changes) => {
  chat.value = {...chat.value, ...changes};
};

function setReply(turnId, column, changes) {
  set({
    turns: chat.value.turns.map((turn) =>
      turn.id === turnId
        ? {...turn, replies: turn.replies.map((one, place) => (place === column ? {...one, ...changes} : one))}
        : turn,
    ),
  });
}

/** What the column was asked and said before a turn. */
function messagesBefore(turn, column) {
  const {system, turns} = chat.value;
  const messages = system.trim() ? [{role: 'system', content: system}] : [];
  for (const one of turns) {
    if (one.id === turn.id) break;
    const reply = one.replies[column];
    if (reply?.text) messages.push({role: 'user', content: one.prompt}, {role: 'assistant', content: reply.text});
  }
  return messages;
}

/** An adapter's name means its current version: asked for by that, so that the reply says which version it was. */
async function versionOf(model) {
  if (model.includes('@')) return model;
  const {adapters} = await get('/api/adapters');
  const current = adapters.find((one) => one.name === model && one.current);
  return current ? `${current.name}@${current.version}` : model;
}

async function answer(turn, column) {
  const {models, temperature, maxTokens} = chat.value;
  const abort = new AbortController();
  running.push(abort);
  const messages = [...messagesBefore(turn, column), {role: 'user', content: turn.prompt}];
  let said = '';
  let shownAt = 0;
  try {
    const body = {model: await versionOf(models[column]), messages, stream: true};
    if (temperature !== '') body.temperature = Number(temperature);
    if (maxTokens !== '') body.max_tokens = Number(maxTokens);
    let end = 'done';
    for await (const {data} of stream('/v1/chat/completions', {method: 'POST', body, abort: abort.signal})) {
      if (data === '[DONE]') break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw chunk.error;
      const [choice] = chunk.choices;
      said += choice?.delta?.content ?? '';
      if (choice?.finish_reason === 'length') end = 'length';
      if (Date.now() - shownAt > SHOW_MS) {
        setReply(turn.id, column, {text: said, model: chunk.model, state: said ? 'streaming' : 'waiting'});
        shownAt = Date.now();
      }
    }
    setReply(turn.id, column, {text: said, state: end});
  } catch (error) {
    const stopped = error.name === 'AbortError';
    const told = {message: error.message, hint: error.hint};
    setReply(turn.id, column, {text: said, ...(stopped ? {state: 'stopped'} : {state: 'failed', error: told})});
  } finally {
    running = running.filter((one) => one !== abort);
  }
}

const isBusy = () => chat.value.turns.some((turn) => turn.replies.some((reply) => BUSY.includes(reply.state)));
const fresh = (model) => ({asked: model, model: null, text: '', state: 'waiting', error: null});

function ask(prompt) {
  const turn = {id: Date.now(), prompt, replies: chat.value.models.map(fresh)};
  set({turns: [...chat.value.turns, turn]});
  turn.replies.forEach((_, column) => answer(turn, column));
}

function regenerate() {
  const turn = chat.value.turns.at(-1);
  const again = {...turn, replies: chat.value.models.map(fresh)};
  set({turns: [...chat.value.turns.slice(0, -1), again]});
  again.replies.forEach((_, column) => answer(again, column));
}

const stop = () => running.forEach((one) => one.abort());

export function Chat({query}) {
  const {data, error} = useData('/v1/models');
  const {data: bases} = useData('/api/models');
  const known = data?.data ?? [];
  const taken = useRef(null);
  if (taken.current !== query) {
    taken.current = query;
    const wanted = query.get('models');
    if (wanted) {
      set({models: wanted.split(',').slice(0, 2)});
      history.replaceState(null, '', '#/chat'); // what is chosen from here on outlives a reload
    }
  }
  useEffect(() => {
    if (!chat.value.models.length && known.length) set({models: [known[0].id]});
  }, [known.length]);
  const {models, turns} = chat.value;
  const busy = isBusy();
  const away = bases?.models.find((one) => models.includes(one.id) && one.state === 'not fetched');
  return html`
    <div class="heading">
      <h1 class="grow">${text.chat.title}</h1>
      ${turns.length > 0 && html`
        <button type="button" class="small" onClick=${() => {
          stop();
          set({turns: []});
        }}>${text.chat.clear}</button>
      `}
    </div>
    <${Problem} error=${error} />
    <div class=${`chat columns-${models.length}`}>
      <div class="pickers">
        ${models.map((model, column) => html`<${Picker} key=${column} ...${{model, column, known, models, busy}} />`)}
        ${models.length === 1 && html`
          <button type="button" class="small add" disabled=${busy} onClick=${() => set({models: [...models, other(known, models[0])]})}>
            ${text.chat.addColumn}
          </button>
        `}
      </div>
      ${away && turns.length === 0 && html`<p class="problem warning">${text.chat.notFetched(away.id)}</p>`}
      <${Options} />
      <div class="turns" role="log" aria-label=${text.chat.conversation} aria-busy=${String(busy)}>
        ${turns.length === 0 && data && (known.some((one) => one.parent !== null)
          ? html`<${Empty}>${text.chat.empty}<//>`
          : html`<${Empty} href="#/teach" next=${text.chat.emptyNext}>${text.chat.emptyNoAdapter}<//>`)}
        ${turns.map((turn, place) => html`<${Turn} key=${turn.id} turn=${turn} last=${place === turns.length - 1} />`)}
      </div>
      <${Composer} ...${{busy, ready: models.length > 0, again: turns.length > 0}} />
    </div>
  `;
}

/** What to compare with: the newest adapter if the other one is a base, else its base. */
function other(known, model) {
  const one = known.find((found) => found.id === model);
  const adapters = known.filter((found) => found.parent !== null).sort((left, right) => right.created - left.created);
  if (one?.parent) return one.root;
  return (adapters.find((found) => !found.id.includes('@')) ?? adapters[0] ?? known.find((found) => found.id !== model) ?? {id: model}).id;
}

const groupOf = (one) =>
  one.parent === null ? 'bases' : !one.id.includes('@') ? 'adapters' : /@.*-/.test(one.id) ? 'checkpoints' : 'versions';

function Picker({model, column, known, models, busy}) {
  const id = `model-${column}`;
  const label = column === 0 ? text.chat.left : text.chat.right;
  const change = (event) => set({models: models.map((one, place) => (place === column ? event.target.value : one))});
  return html`
    <div class="picker">
      <label for=${id}>${label}</label>
      <div class="row tight">
        <select id=${id} class="grow" value=${model} disabled=${busy} onChange=${change}>
          ${!known.some((one) => one.id === model) && html`<option value=${model}>${known.length ? text.chat.gone(model) : model}</option>`}
          ${Object.entries(text.chat.groups).map(([group, title]) => {
            const of = known.filter((one) => groupOf(one) === group);
            return (
              of.length > 0 &&
              html`<optgroup key=${group} label=${title}>
                ${of.map((one) => html`<option key=${one.id} value=${one.id}>${one.id}</option>`)}
              </optgroup>`
            );
          })}
        </select>
        ${column === 1 && html`
          <button type="button" class="icon" disabled=${busy} aria-label=${text.chat.removeColumn} title=${text.chat.removeColumn}
            onClick=${() => set({models: [models[0]]})}>×</button>
        `}
      </div>
    </div>
  `;
}

function Options() {
  const {system, temperature, maxTokens} = chat.value;
  return html`
    <details class="options">
      <summary>${text.chat.settings}</summary>
      <${Field} id="system" label=${text.chat.system}>
        ${(about) => html`<textarea ...${about} rows="2" value=${system} onInput=${(event) => set({system: event.target.value})} />`}
      <//>
      <div class="pair">
        <${Field} id="temperature" label=${text.chat.temperature} help=${text.chat.temperatureHelp}>
          ${(about) => html`<input ...${about} type="number" min="0" max="2" step="0.1" value=${temperature}
            onInput=${(event) => set({temperature: event.target.value})} />`}
        <//>
        <${Field} id="max-tokens" label=${text.chat.maxTokens}>
          ${(about) => html`<input ...${about} type="number" min="1" step="1" value=${maxTokens}
            onInput=${(event) => set({maxTokens: event.target.value})} />`}
        <//>
      </div>
    </details>
  `;
}

function Turn({turn, last}) {
  const end = useRef(null);
  const length = turn.replies.reduce((sum, reply) => sum + reply.text.length, 0);
  useEffect(() => {
    const near = document.documentElement.scrollHeight - scrollY - innerHeight < 240;
    if (last && (length === 0 || near)) end.current?.scrollIntoView({block: 'nearest'});
  }, [length, last]);
  return html`
    <article class="turn">
      <p class="prompt"><span class="hidden">${text.chat.you}: </span>${turn.prompt}</p>
      <div class="replies">
        ${turn.replies.map((reply, column) => html`<${Reply} key=${column} ...${{reply, prompt: turn.prompt}} />`)}
      </div>
      <div class="end" ref=${end}></div>
    </article>
  `;
}

function Reply({reply, prompt}) {
  const {chat: words} = text;
  const note = {stopped: words.stopped, length: words.cutOff}[reply.state];
  return html`
    <div class="reply card">
      ${reply.state === 'waiting' && html`<p class="muted">${words.waiting} <small>${words.loadingModel}</small></p>`}
      ${reply.text && html`<${Markdown} source=${reply.text} />`}
      <${Problem} error=${reply.error} />
      <footer>
        <span class="muted">
          ${reply.model ? words.answeredBy(reply.model) : reply.asked}${note && ` · ${note}`}
        </span>
        ${reply.text && !BUSY.includes(reply.state) && html`
          <button type="button" class="small" title=${words.wrongHelp} onClick=${() => teachAnswerTo(prompt)}>${words.wrong}</button>
        `}
      </footer>
    </div>
  `;
}

function Composer({busy, ready, again}) {
  const [prompt, setPrompt] = useState('');
  const box = useRef(null);
  const send = (event) => {
    event.preventDefault();
    const typed = box.current.value.trim(); // the state is a render behind a key that follows at once
    if (busy || !ready || !typed) return;
    ask(typed);
    box.current.value = '';
    setPrompt('');
  };
  const keys = (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) send(event);
  };
  return html`
    <form class="composer card" onSubmit=${send}>
      <label class="hidden" for="prompt">${text.chat.prompt}</label>
      <textarea id="prompt" ref=${box} rows="2" placeholder=${text.chat.promptExample} aria-describedby="prompt-help" value=${prompt}
        onInput=${(event) => setPrompt(event.target.value)} onKeyDown=${keys} />
      <div class="row">
        <span class="help grow" id="prompt-help">${text.chat.promptHelp}</span>
        ${again && !busy && html`<button type="button" onClick=${regenerate}>${text.chat.regenerate}</button>`}
        ${busy
          ? html`<button type="button" onClick=${stop}>${text.chat.stop}</button>`
          : html`<button class="primary" disabled=${!ready || !prompt.trim()}>${text.chat.send}</button>`}
      </div>
    </form>
  `;
}
