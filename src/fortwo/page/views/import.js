/** An adapter that PEFT saved in a folder of the server becomes a version here. */
import {postForText} from '../api.js';
import {Field, Problem, html, useAction, useState} from '../parts.js';
import {text} from '../text.js';

/** changed(told): there is a new version. */
export function Import({changed}) {
  const [name, setName] = useState('');
  const [path, setPath] = useState('');
  const action = useAction();
  const take = (event) => {
    event.preventDefault();
    action.run(async () => {
      await postForText('/v1/load_lora_adapter', {lora_name: name.trim(), lora_path: path.trim(), load_inplace: true});
      changed(text.imports.done(name.trim()));
      setName('');
      setPath('');
    });
  };
  return html`
    <details class="card import">
      <summary>${text.imports.title}</summary>
      <form onSubmit=${take}>
        <div class="pair">
          <${Field} id="import-name" label=${text.teach.name} help=${text.teach.nameHelp}>
            ${(about) => html`<input ...${about} value=${name} required autocomplete="off" onInput=${(event) => setName(event.target.value)} />`}
          <//>
          <${Field} id="import-path" label=${text.imports.path} help=${text.imports.pathHelp}>
            ${(about) => html`<input ...${about} value=${path} required autocomplete="off" onInput=${(event) => setPath(event.target.value)} />`}
          <//>
        </div>
        <${Problem} error=${action.error} />
        <div class="row"><button class="primary" disabled=${action.busy || !name.trim() || !path.trim()}>${text.imports.submit}</button></div>
      </form>
    </details>
  `;
}
