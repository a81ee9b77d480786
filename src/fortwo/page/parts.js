/** What the views share: html, loading of data, figures as people read them, and small components. */
import {h} from './vendor/preact.js';
import {useEffect, useRef, useState} from './vendor/hooks.js';
import htm from './vendor/htm.js';
import './vendor/signals.js'; // components follow the signals that they read
import {epoch, get} from './api.js';
import {language, text} from './text.js';

export const html = htm.bind(h);
export {useEffect, useRef, useState};

/**
 * What GET path answers: {data, error, reload}. Asked again when the connection is back and, while the page is visible,
 * every `every` ms; with every = 0 only then. path null: nothing is asked.
 */
export function useData(path, every = 0) {
  const [state, setState] = useState(/** @type {{path: any, data: any, error: any}} */ ({path: null, data: null, error: null}));
  const [turn, setTurn] = useState(0);
  const again = epoch.value;
  useEffect(() => {
    if (path === null) return undefined;
    const abort = new AbortController();
    const ask = () =>
      get(path, abort.signal).then(
        (data) => setState({path, data, error: null}),
        (error) => {
          if (error.name !== 'AbortError') setState((was) => ({path, data: was.path === path ? was.data : null, error}));
        },
      );
    ask();
    const timer = every ? setInterval(() => document.visibilityState === 'visible' && ask(), every) : undefined;
    return () => {
      clearInterval(timer);
      abort.abort();
    };
  }, [path, every, turn, again]);
  const fresh = state.path === path ? state : {data: null, error: null};
  return {data: fresh.data, error: fresh.error, reload: () => setTurn((was) => was + 1)};
}

/** An action that is under way at most once: {busy, error, run, clear}. run(f) awaits f and keeps its ApiError. */
export function useAction() {
  const [state, setState] = useState(/** @type {{busy: boolean, error: any}} */ ({busy: false, error: null}));
  const run = async (action) => {
    setState({busy: true, error: null});
    try {
      const result = await action();
      setState({busy: false, error: null});
      return result;
    } catch (error) {
      setState({busy: false, error});
      return undefined;
    }
  };
  return {...state, run, clear: () => setState({busy: false, error: null})};
}

/** The time in seconds, renewed each second while `running`. */
export function useNow(running) {
  const [now, setNow] = useState(Date.now() / 1000);
  useEffect(() => {
    setNow(Date.now() / 1000);
    if (!running) return undefined;
    const timer = setInterval(() => setNow(Date.now() / 1000), 1000);
    return () => clearInterval(timer);
  }, [running]);
  return now;
}

// ---------------------------------------------------------------- figures

export function number(value, digits = 4) {
  return value.toLocaleString(language, {maximumSignificantDigits: digits});
}

/** A value of a plan as a person would write it. */
export function shown(value) {
  if (value === null || value === undefined) return text.none;
  if (typeof value === 'boolean') return value ? text.yes : text.no;
  if (typeof value === 'number') return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : number(value);
  if (Array.isArray(value)) return value.length ? value.map(shown).join(', ') : text.none;
  if (typeof value === 'object') {
    return Object.entries(value).map(([name, one]) => `${name} ${shown(one)}`).join(', ') || text.none;
  }
  return String(value);
}

export function share(value) {
  return value === null || value === undefined
    ? text.none
    : value.toLocaleString(language, {minimumFractionDigits: 2, maximumFractionDigits: 2});
}

export function size(bytes) {
  if (bytes === null || bytes === undefined) return text.none;
  let unit = 0;
  while (bytes >= 1024 && unit < text.units.bytes.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${number(bytes, 3)} ${text.units.bytes[unit]}`;
}

/** Parameters, as models are spoken of: 135M, 6.74B. */
export function parameters(count) {
  if (count === null) return text.none;
  return count >= 1e9 ? `${number(count / 1e9, 3)}B` : count >= 1e6 ? `${number(count / 1e6, 3)}M` : number(count, 3);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return text.none;
  const {second, minute, hour} = text.units;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 10 && seconds > 0) return `${number(Math.max(seconds, 0.1), 2)} ${second}`;
  if (whole < 60) return `${whole} ${second}`;
  const [large, small, ...units] =
    whole < 3600
      ? [Math.floor(whole / 60), whole % 60, minute, second]
      : [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), hour, minute];
  return small ? `${large} ${units[0]} ${small} ${units[1]}` : `${large} ${units[0]}`;
}

export const percent = (value) => value.toLocaleString(language, {style: 'percent', maximumFractionDigits: 1});

/** Gives the browser a file to save. */
export function download({name, type, content}) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([content], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export function moment(seconds) {
  return seconds === null || seconds === undefined
    ? text.none
    : new Date(seconds * 1000).toLocaleString(language, {dateStyle: 'medium', timeStyle: 'short'});
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString(language);
}

// ---------------------------------------------------------------- components

/** An error with its remedy, as the API tells it. */
export function Problem({error, title}) {
  if (!error) return null;
  return html`
    <div class="problem" role="alert">
      ${title && html`<strong>${title}</strong>`}
      <p class="message">${error.message}</p>
      ${error.hint && html`<p class="hint">${error.hint}</p>`}
    </div>
  `;
}

export function Warnings({of, kind = 'warning'}) {
  return (of ?? []).map(
    (one) => html`
      <div class=${`problem ${kind}`} key=${one.code + one.message}>
        <p class="message">${one.message}</p>
        <p class="hint">${one.hint}</p>
      </div>
    `,
  );
}

export function Empty({children, href, next}) {
  return html`
    <div class="empty">
      <p>${children}</p>
      ${href && html`<a class="button primary" href=${href}>${next}</a>`}
    </div>
  `;
}

export function Loading() {
  return html`<p class="muted" role="status">${text.loading}</p>`;
}

export function Status({of}) {
  return html`<span class=${`chip ${of}`}>${text.status[of] ?? of}</span>`;
}

/** A labelled control. It gets id and aria-describedby from here: children is a function of those. */
export function Field({id, label, help, children}) {
  const about = help ? {id, 'aria-describedby': `${id}-help`} : {id};
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      ${children(about)}
      ${help && html`<p class="help" id=${`${id}-help`}>${help}</p>`}
    </div>
  `;
}

/** Asks before something is done that cannot be taken back. other: {label, run} of what can be done instead. */
export function Confirm({title, children, confirm, keep, other, danger = true, onConfirm, onClose}) {
  const dialog = useRef(null);
  useEffect(() => dialog.current.showModal(), []);
  return html`
    <dialog ref=${dialog} aria-labelledby="confirm-title" onClose=${onClose}>
      <h2 id="confirm-title">${title}</h2>
      <p>${children}</p>
      <div class="row end">
        <button type="button" autofocus onClick=${() => dialog.current.close()}>${keep}</button>
        ${other && html`
          <button type="button" onClick=${() => {
            dialog.current.close();
            other.run();
          }}>${other.label}</button>
        `}
        <button
          type="button"
          class=${danger ? 'danger' : 'primary'}
          onClick=${() => {
            dialog.current.close();
            onConfirm();
          }}
        >${confirm}</button>
      </div>
    </dialog>
  `;
}

/** A share with its interval and target, drawn from 0 to 1. */
export function ShareBar({value, low, high, target, base}) {
  const at = (part) => part * 100;
  return html`
    <svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
      <rect class="track" x="0" y="3" width="100" height="4" rx="1" />
      <rect class=${target !== undefined && value < target ? 'bar missed' : 'bar'} x="0" y="3" width=${at(value)} height="4" />
      ${low !== undefined && html`<rect class="interval" x=${at(low)} y="4.5" width=${at(high - low)} height="1" />`}
      ${base !== undefined && html`<rect class="base" x=${Math.max(0, at(base) - 0.5)} y="2" width="1" height="6" />`}
      ${target !== undefined && html`<rect class="target" x=${at(target) - 0.5} y="0" width="1" height="10" />`}
    </svg>
  `;
}

/** A name in code, which may break behind its underscores and points. */
export function Name({of}) {
  return html`<code>${of.split(/(?<=[_.])/).flatMap((part) => [part, html`<wbr />`])}</code>`;
}

/** Every value of a plan with who chose it and why. */
export function Settings({plan}) {
  const yours = plan.settings.filter((setting) => setting.origin === 'user').length;
  return html`
    <details class="settings">
      <summary>${text.plan.settings(plan.settings.length, yours)}</summary>
      <div class="scroll" tabindex="0" role="region" aria-label=${text.plan.settings(plan.settings.length, yours)}>
        <table>
          <thead>
            <tr>
              <th scope="col">${text.plan.setting}</th>
              <th scope="col">${text.plan.value}</th>
              <th scope="col">${text.plan.origin}</th>
              <th scope="col">${text.plan.reason}</th>
            </tr>
          </thead>
          <tbody>
            ${plan.settings.map(
              (setting) => html`
                <tr key=${setting.name} class=${setting.origin === 'user' ? 'yours' : ''}>
                  <th scope="row"><${Name} of=${setting.name} /></th>
                  <td>${shown(setting.value)}</td>
                  <td>${setting.origin}</td>
                  <td>${setting.reason}</td>
                </tr>
              `,
            )}
          </tbody>
        </table>
      </div>
    </details>
  `;
}
