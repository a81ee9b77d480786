/** A job and its events, as the server keeps them: so any tab shows the same, also after a reload. */
import {connected, epoch, get, stream} from './api.js';
import {useEffect, useState} from './parts.js';
import {text} from './text.js';

const BATCH_MS = 150; // events that arrive together are shown together
const RETRY_MS = 1000;
export const ACTIVE = ['queued', 'preparing', 'running', 'evaluating'];
export const AT_REST = ['succeeded', 'failed', 'cancelled', 'paused'];

const sleep = (milliseconds) => new Promise((ready) => setTimeout(ready, milliseconds));

/** The job and its events, which grow while it runs: {job, events, error, again}. again(): it was resumed. */
export function useJob(id) {
  const [state, setState] = useState(/** @type {{job: any, events: any[], error: any}} */ ({job: null, events: [], error: null}));
  const [turn, setTurn] = useState(0);
  const back = epoch.value;
  useEffect(() => {
    const abort = new AbortController();
    const path = `/api/training/jobs/${id}`;
    const events = [];
    let last = 0;
    let timer = null;
    const show = (job) => {
      clearTimeout(timer);
      timer = null;
      setState((was) => ({job: job ?? was.job, events: [...events], error: null}));
    };
    const follow = async () => {
      for (;;) {
        show(await get(path, abort.signal));
        const news = stream(`${path}/events`, {headers: {'Last-Event-ID': String(last)}, abort: abort.signal});
        for await (const event of news) {
          last = Number(event.id);
          events.push(JSON.parse(event.data));
          timer ??= setTimeout(show, BATCH_MS);
        }
        const job = await get(path, abort.signal);
        show(job);
        if (AT_REST.includes(job.status)) return;
        await sleep(RETRY_MS);
      }
    };
    follow().catch((error) => {
      if (abort.signal.aborted || !connected.value) return;
      setState((was) => ({...was, error}));
      if (error.status >= 500) timer = setTimeout(() => setTurn((was) => was + 1), RETRY_MS);
    });
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [id, turn, back]);
  return {...state, again: () => setTurn((was) => was + 1)};
}

/** What events say, in the order of steps: those after a resume take the place of those they repeat. */
export function told(job, events) {
  const steps = new Map();
  const evaluations = new Map();
  const others = [];
  let {status} = job;
  let at = 0;
  for (const event of events) {
    if (event.type === 'step') {
      if (event.data.step <= at) {
        for (const step of [...steps.keys()].filter((one) => one >= event.data.step)) steps.delete(step);
      }
      steps.set(event.data.step, event.data);
      at = event.data.step;
    } else if (event.type === 'metrics') {
      evaluations.set(event.data.step, event.data);
    } else {
      others.push({...event, step: at});
      if (event.type in text.status && !AT_REST.includes(job.status)) status = event.type;
    }
  }
  const shares = [...evaluations.values()].sort((one, other) => one.step - other.step);
  return {status, steps: [...steps.values()], evaluations: shares, others};
}
