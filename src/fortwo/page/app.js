/** The frame of the page: the view that the address names, the bar of a lost connection, the question for a key. */
import {render} from './vendor/preact.js';
import {signal} from './vendor/signals.js';
import {connected, keyNeeded, setKey, watchConnection} from './api.js';
import {Field, Problem, html, useAction, useEffect, useRef, useState} from './parts.js';
import {language, text} from './text.js';
import {Adapters} from './views/adapters.js';
import {Chat} from './views/chat.js';
import {Job} from './views/job.js';
import {Jobs} from './views/jobs.js';
import {Machine} from './views/machine.js';
import {Runs} from './views/runs.js';
import {Teach} from './views/teach.js';

const VIEWS = {teach: Teach, jobs: Jobs, job: Job, runs: Runs, chat: Chat, adapters: Adapters, machine: Machine};
const TABS = ['teach', 'jobs', 'chat', 'adapters', 'machine'];

/** #/job/ID?tab=x as {view: 'job', id: 'ID', query}. */
function read() {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?');
  const [view, ...rest] = path.split('/');
  return {view: view || 'teach', id: rest.map(decoded).join('/'), query: new URLSearchParams(query)};
}

/** A part of the address, as it was written if it is not encoded. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

const route = signal(read());
addEventListener('hashchange', () => {
  route.value = read();
});

function Key() {
  const [given, setGiven] = useState('');
  const action = useAction();
  const submit = (event) => {
    event.preventDefault();
    action.run(() => setKey(given));
  };
  return html`
    <main id="content" class="narrow">
      <form class="card" onSubmit=${submit}>
        <h1>${text.key.title}</h1>
        <p>${text.key.lead}</p>
        <${Field} id="key" label=${text.key.label}>
          ${(about) => html`<input ...${about} type="password" autocomplete="current-password" required value=${given}
            onInput=${(event) => setGiven(event.target.value)} />`}
        <//>
        <${Problem} error=${action.error} />
        <div class="row"><button class="primary" disabled=${action.busy}>${text.key.submit}</button></div>
      </form>
    </main>
  `;
}

function Unknown() {
  return html`<h1>${text.notFoundView}</h1>`;
}

function App() {
  const {view, id, query} = route.value;
  const View = VIEWS[view] ?? Unknown;
  const shown = ['job', 'runs'].includes(view) ? 'jobs' : view;
  const main = useRef(null);
  const first = useRef(true);
  useEffect(() => {
    const name = text.nav[shown];
    document.title = name ? `${name} · ${text.brand}` : text.brand;
    if (!first.current) {
      scrollTo(0, 0);
      main.current?.focus({preventScroll: true});
    }
    first.current = false;
  }, [view, id]);
  return html`
    <a class="skip" href="#content" onClick=${(event) => {
      event.preventDefault();
      main.current?.focus();
    }}>${text.skip}</a>
    <header class="top">
      <a class="brand" href="#/teach"><img src="/page/icon.svg" alt="" width="24" height="24" />${text.brand}</a>
      <nav aria-label=${text.nav.label}>
        ${TABS.map(
          (tab) => html`<a key=${tab} href=${`#/${tab}`} aria-current=${tab === shown ? 'page' : undefined}>${text.nav[tab]}</a>`,
        )}
      </nav>
    </header>
    <div role="status" aria-live="polite">
      ${!connected.value && html`<p class="lost">${text.connectionLost}</p>`}
    </div>
    ${keyNeeded.value
      ? html`<${Key} />`
      : html`<main id="content" ref=${main} tabindex="-1"><${View} key=${`${view}/${id}`} id=${id} query=${query} /></main>`}
  `;
}

document.documentElement.lang = language;
watchConnection();
render(html`<${App} />`, document.getElementById('app'));
