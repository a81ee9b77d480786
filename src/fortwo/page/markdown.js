/** Replies of models as HTML that can do nothing: no scripts, styles, forms or pictures. Loaded when chat is shown. */
import {html, useEffect, useState} from './parts.js';

let library = null;

function load() {
  library ??= Promise.all([import('./vendor/marked.js'), import('./vendor/dompurify.js')]).then(
    ([{marked}, {default: purify}]) => {
      purify.addHook('afterSanitizeAttributes', (node) => {
        if (node.tagName === 'A') {
          node.setAttribute('target', '_blank');
          node.setAttribute('rel', 'noopener noreferrer');
        }
      });
      const allowed = {
        USE_PROFILES: {html: true},
        FORBID_TAGS: ['style', 'form', 'input', 'button', 'textarea', 'select', 'img', 'picture', 'audio', 'video'],
        FORBID_ATTR: ['style', 'id', 'name', 'class'],
      };
      return (source) => purify.sanitize(marked.parse(source, {gfm: true, breaks: true, async: false}), allowed);
    },
  );
  return library;
}

/** Plain text until the library is there. */
export function Markdown({source}) {
  const [render, setRender] = useState(null);
  useEffect(() => {
    load().then((ready) => setRender(() => ready));
  }, []);
  if (!render) return html`<div class="prose plain">${source}</div>`;
  return html`<div class="prose" dangerouslySetInnerHTML=${{__html: render(source)}}></div>`;
}
