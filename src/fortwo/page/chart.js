/** Curves over steps, drawn by uPlot, which is loaded when the first one is shown. */
import {html, useEffect, useRef} from './parts.js';
import {language, text} from './text.js';

let library = null;

function load() {
  library ??= new Promise((ready) => {
    const sheet = document.createElement('link');
    sheet.rel = 'stylesheet';
    sheet.href = '/page/vendor/uplot.css';
    document.head.append(sheet);
    ready(import('./vendor/uplot.js').then((module) => module.default));
  });
  return library;
}

const color = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const dark = matchMedia('(prefers-color-scheme: dark)');

/** Vertical lines at these steps. */
function drawMarks(uplot, steps) {
  const {ctx, bbox} = uplot;
  ctx.save();
  ctx.strokeStyle = color('faint')();
  ctx.setLineDash([2, 4]);
  for (const step of steps) {
    const x = Math.round(uplot.valToPos(step, 'x', true));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/**
 * data: [steps, ...values], null where there is none. series: for each of the values {label, color, width, dash,
 * points}. range: of the vertical axis. summary: what the curve shows, in words. marks: of steps, each {step, label}.
 */
export function Chart({data, series, range, summary, marks = [], height = 220}) {
  const place = useRef(null);
  const plot = useRef(null);
  const newest = useRef(data);
  newest.current = data;
  const shape = JSON.stringify(series);
  const marked = useRef(marks);
  marked.current = marks;
  useEffect(() => {
    const box = place.current;
    let gone = box === null;
    let watch = null;
    const redraw = () => plot.current?.redraw(false);
    load().then((uPlot) => {
      if (gone) return;
      const axis = {stroke: color('muted'), grid: {stroke: color('line'), width: 1}, ticks: {stroke: color('line'), width: 1}};
      const options = {
        width: box.clientWidth,
        height,
        cursor: {drag: {x: false, y: false}},
        legend: {live: true},
        hooks: {drawAxes: [(uplot) => drawMarks(uplot, marked.current.map((mark) => mark.step))]},
        scales: {x: {time: false}, y: range ? {range} : {}},
        axes: [
          {...axis, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2500, 5000, 10000, 25000, 100000]},
          {...axis, size: 48, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString(language))},
        ],
        series: [
          {label: series.x},
          ...series.values.map((one) => ({
            label: one.label,
            stroke: color(one.color),
            width: one.width ?? 2,
            dash: one.dash,
            spanGaps: true,
            points: {show: Boolean(one.points), size: 7, fill: color(one.color)},
            value: (_, value) => (value === null || value === undefined ? '–' : value.toPrecision(3)),
          })),
        ],
      };
      plot.current = new uPlot(options, newest.current, box);
      watch = new ResizeObserver(() => plot.current?.setSize({width: box.clientWidth, height}));
      watch.observe(box);
    });
    dark.addEventListener('change', redraw);
    return () => {
      gone = true;
      watch?.disconnect();
      dark.removeEventListener('change', redraw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => plot.current?.setData(data), [data]);
  return html`
    <div class="chart" role="img" aria-label=${summary} ref=${place}></div>
    ${marks.length > 0 && html`
      <details class="marks">
        <summary>${text.job.marks(marks.length)}</summary>
        <ol>${marks.map((mark, row) => html`<li key=${row}>${text.job.atStep(mark.step)}: ${mark.label}</li>`)}</ol>
      </details>
    `}
  `;
}
