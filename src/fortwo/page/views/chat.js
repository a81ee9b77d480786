/** Chat: one prompt, answered by one or two models side by side. */
import {BUSY, PROMPTED, ask, branchAt, chat, clear, exported, isBusy, regenerate, set, stop, tally, turns, vote} from '../conversation.js';
import {teachAnswerTo} from '../draft.js';
import {Markdown} from '../markdown.js';
import {Empty, Field, Problem, download, html, percent, useData, useEffect, useRef, useState} from '../parts.js';
import {text} from '../text.js';

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
  const {models} = chat.value;
  const busy = isBusy();
  const away = bases?.models.find((one) => models.includes(one.id) && one.state === 'not fetched');
  return html`
    <div class="heading">
      <h1 class="grow">${text.chat.title}</h1>
      ${turns().length > 0 && html`<${Exports} /><button type="button" class="small" onClick=${clear}>${text.chat.clear}</button>`}
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
      ${away && turns().length === 0 && html`<p class="problem warning">${text.chat.notFetched(away.id)}</p>`}
      <${Options} columns=${models.length} />
      <${Branches} busy=${busy} />
      <${Tally} />
      <div class="turns" role="log" aria-label=${text.chat.conversation} aria-busy=${String(busy)}>
        ${turns().length === 0 && data && (known.some((one) => one.parent !== null)
          ? html`<${Empty}>${text.chat.empty}<//>`
          : html`<${Empty} href="#/teach" next=${text.chat.emptyNext}>${text.chat.emptyNoAdapter}<//>`)}
        ${turns().map((turn, place) => html`<${Turn} key=${turn.id} ...${{turn, busy, last: place === turns().length - 1}} />`)}
      </div>
      <${Composer} ...${{busy, ready: models.length > 0, again: turns().length > 0}} />
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
  const prompted = known.filter((one) => groupOf(one) === 'adapters').map((one) => `${PROMPTED}${one.id}`);
  const there = known.some((one) => one.id === model) || prompted.includes(model);
  return html`
    <div class="picker">
      <label for=${id}>${label}</label>
      <div class="row tight">
        <select id=${id} class="grow" value=${model} disabled=${busy} onChange=${change}>
          ${!there && html`<option value=${model}>${known.length ? text.chat.gone(model) : nameOf(model)}</option>`}
          ${Object.entries(text.chat.groups).map(([group, title]) => {
            const of = known.filter((one) => groupOf(one) === group);
            return (
              of.length > 0 &&
              html`<optgroup key=${group} label=${title}>
                ${of.map((one) => html`<option key=${one.id} value=${one.id}>${one.id}</option>`)}
              </optgroup>`
            );
          })}
          ${prompted.length > 0 && html`
            <optgroup label=${text.chat.promptedGroup}>
              ${prompted.map((one) => html`<option key=${one} value=${one}>${nameOf(one)}</option>`)}
            </optgroup>`}
        </select>
        ${column === 1 && html`
          <button type="button" class="icon" disabled=${busy} aria-label=${text.chat.removeColumn} title=${text.chat.removeColumn}
            onClick=${() => set({models: [models[0]]})}>×</button>
        `}
      </div>
    </div>
  `;
}

const nameOf = (model) => (model.startsWith(PROMPTED) ? text.chat.prompted(model.slice(PROMPTED.length)) : model);

function Options({columns}) {
  const {system, temperature, topP, seed, maxTokens, surprise, blind} = chat.value;
  const number = (id, key, value, label, help, limits) => html`
    <${Field} id=${id} label=${label} help=${help}>
      ${(about) => html`<input ...${about} type="number" ...${limits} value=${value} onInput=${(event) => set({[key]: event.target.value})} />`}
    <//>
  `;
  return html`
    <details class="options">
      <summary>${text.chat.settings}</summary>
      <${Field} id="system" label=${text.chat.system}>
        ${(about) => html`<textarea ...${about} rows="2" value=${system} onInput=${(event) => set({system: event.target.value})} />`}
      <//>
      <div class="pair">
        ${number('temperature', 'temperature', temperature, text.chat.temperature, text.chat.temperatureHelp, {min: 0, max: 2, step: 0.1})}
        ${number('max-tokens', 'maxTokens', maxTokens, text.chat.maxTokens, undefined, {min: 1, step: 1})}
        ${number('top-p', 'topP', topP, text.chat.topP, text.chat.topPHelp, {min: 0, max: 1, step: 0.05})}
        ${number('seed', 'seed', seed, text.chat.seed, text.chat.seedHelp, {step: 1})}
      </div>
      <div class="row">
        <label class="check">
          <input type="checkbox" id="surprise" checked=${surprise} onChange=${(event) => set({surprise: event.target.checked})} />
          ${text.chat.surprise}
        </label>
        ${columns === 2 && html`
          <label class="check">
            <input type="checkbox" id="blind" checked=${blind} onChange=${(event) => set({blind: event.target.checked})} />
            ${text.chat.blind}
          </label>
        `}
      </div>
      ${surprise && html`<p class="help">${text.chat.surpriseHelp}</p>`}
    </details>
  `;
}

function Exports() {
  return ['json', 'markdown'].map(
    (form) => html`
      <button key=${form} type="button" class="small" onClick=${() => download(exported(form))}>${text.chat.exports[form]}</button>
    `,
  );
}

function Branches({busy}) {
  const {branches, branch} = chat.value;
  if (branches.length < 2) return null;
  const move = (by) => set({branch: branch + by});
  return html`
    <div class="row branches">
      <button type="button" class="small" disabled=${busy || branch === 0} aria-label=${text.chat.branchBefore} onClick=${() => move(-1)}>‹</button>
      <span role="status">${text.chat.branch(branch + 1, branches.length)}</span>
      <button type="button" class="small" disabled=${busy || branch === branches.length - 1} aria-label=${text.chat.branchAfter}
        onClick=${() => move(1)}>›</button>
    </div>
  `;
}

function Tally() {
  const {won, even, count} = tally();
  if (!count) return null;
  return html`
    <p class="tally" role="status">
      ${text.chat.votes(count)}: ${won.map(([model, votes]) => `${nameOf(model)} ${votes}`).join(', ')}, ${text.chat.even} ${even}
    </p>
  `;
}

function Turn({turn, last, busy}) {
  const end = useRef(null);
  const [editing, setEditing] = useState(null);
  const length = turn.replies.reduce((sum, reply) => sum + reply.text.length, 0);
  const hidden = turn.blind && turn.vote === null;
  useEffect(() => {
    const near = document.documentElement.scrollHeight - scrollY - innerHeight < 240;
    if (last && (length === 0 || near)) end.current?.scrollIntoView({block: 'nearest'});
  }, [length, last]);
  const send = (event) => {
    event.preventDefault();
    if (!editing.trim()) return;
    setEditing(null);
    branchAt(turn.id, editing.trim());
  };
  const order = turn.order ?? turn.replies.map((_, column) => column);
  return html`
    <article class="turn">
      ${editing === null
        ? html`
            <div class="asked-row">
              <button type="button" class="small quiet" disabled=${busy} onClick=${() => setEditing(turn.prompt)}>
                ${text.chat.edit}<span class="hidden"> ${turn.prompt}</span>
              </button>
              <p class="prompt"><span class="hidden">${text.chat.you}: </span>${turn.prompt}</p>
            </div>`
        : html`
            <form class="edit" onSubmit=${send}>
              <label class="hidden" for=${`edit-${turn.id}`}>${text.chat.editLabel}</label>
              <textarea id=${`edit-${turn.id}`} rows="2" value=${editing} onInput=${(event) => setEditing(event.target.value)} />
              <div class="row end">
                <button type="button" class="small" onClick=${() => setEditing(null)}>${text.chat.editCancel}</button>
                <button class="small primary">${text.chat.editSend}</button>
              </div>
            </form>`}
      <div class="replies">
        ${order.map((column, place) => html`
          <${Reply} key=${column} ...${{reply: turn.replies[column], prompt: turn.prompt, letter: hidden ? 'AB'[place] : null}} />`)}
      </div>
      ${hidden && turn.replies.every((reply) => !BUSY.includes(reply.state)) && html`
        <div class="row votes" role="group" aria-label=${text.chat.vote}>
          ${order.map((column, place) => html`
            <button key=${column} type="button" onClick=${() => vote(turn.id, column)}>${text.chat.better('AB'[place])}</button>`)}
          <button type="button" onClick=${() => vote(turn.id, -1)}>${text.chat.same}</button>
        </div>
      `}
      <div class="end" ref=${end}></div>
    </article>
  `;
}

/** letter: of a reply in a blind comparison before the vote. */
function Reply({reply, prompt, letter}) {
  const {chat: words} = text;
  const note = {stopped: words.stopped, length: words.cutOff}[reply.state];
  const surprise = chat.value.surprise && reply.tokens?.length > 0;
  return html`
    <div class="reply card">
      ${reply.state === 'waiting' && html`<p class="muted">${words.waiting} <small>${words.loadingModel}</small></p>`}
      ${reply.text && (surprise ? html`<${Surprise} tokens=${reply.tokens} />` : html`<${Markdown} source=${reply.text} />`)}
      <${Problem} error=${reply.error} />
      ${reply.checked === false && html`<p class="problem">${words.otherWeights}</p>`}
      <footer>
        <span class="muted">
          ${letter ? words.column(letter) : html`
            ${reply.model ? words.answeredBy(reply.stated ? nameOf(reply.asked) : reply.model) : nameOf(reply.asked)}
            ${reply.fingerprint && html` <code title=${words.fingerprintHelp}>${reply.fingerprint}</code>`}
            ${note && ` · ${note}`}
          `}
        </span>
        ${!letter && reply.text && !BUSY.includes(reply.state) && html`
          <button type="button" class="small" title=${words.wrongHelp} onClick=${() => teachAnswerTo(prompt)}>${words.wrong}</button>
        `}
      </footer>
    </div>
  `;
}

const LEVELS = [0.9, 0.5, 0.2, 0.05]; // of a token's probability, from the expected to the surprising

function Surprise({tokens}) {
  return html`
    <p class="prose plain surprise">
      ${tokens.map(([token, logprob], place) => {
        const likely = Math.exp(logprob);
        const level = LEVELS.filter((least) => likely < least).length;
        return html`<span key=${place} class=${`s${level}`} title=${percent(likely)}>${token}</span>`;
      })}
    </p>
  `;
}

function Composer({busy, ready, again}) {
  const [prompt, setPrompt] = useState('');
  const [early, setEarly] = useState(false); // sent before the models were known
  const box = useRef(null);
  const send = () => {
    const typed = box.current.value.trim(); // the state is a render behind a key that follows at once
    setEarly(!ready);
    if (busy || !ready || !typed) return;
    ask(typed);
    box.current.value = '';
    setPrompt('');
  };
  useEffect(() => {
    if (ready && early) send();
  }, [ready, early]);
  const submit = (event) => {
    event.preventDefault();
    send();
  };
  const keys = (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
  };
  return html`
    <form class="composer card" onSubmit=${submit}>
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
