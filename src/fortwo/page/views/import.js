/** An adapter that PEFT saved, as files or in a folder of the server, becomes a version here. */
import {postForText, upload} from '../api.js';
import {Field, Problem, html, useAction, useState} from '../parts.js';
import {tar} from '../tar.js';
import {text} from '../text.js';

const ARCHIVE = /\.(tar|tgz|tar\.gz|zip)$/i;

/** changed(told): there is a new version. */
export function Import({changed}) {
  const [name, setName] = useState('');
  const [path, setPath] = useState('');
  const [files, setFiles] = useState(/** @type {File[]} */ ([]));
  const action = useAction();
  const take = (event) => {
    event.preventDefault();
    action.run(async () => {
      if (files.length) {
        const archive = files.length === 1 && ARCHIVE.test(files[0].name) ? files[0] : tar(files, text.imports.archive);
        await upload('/api/adapters/import', archive, {name: name.trim()});
      } else {
        await postForText('/v1/load_lora_adapter', {lora_name: name.trim(), lora_path: path.trim(), load_inplace: true});
      }
      changed(text.imports.done(name.trim()));
      setName('');
      setPath('');
      setFiles([]);
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
          <${Field} id="import-files" label=${text.imports.files} help=${text.imports.filesHelp}>
            ${(about) => html`<input ...${about} type="file" multiple onChange=${(event) => setFiles([...event.target.files])} />`}
          <//>
          <${Field} id="import-path" label=${text.imports.path} help=${text.imports.pathHelp}>
            ${(about) => html`<input ...${about} value=${path} disabled=${files.length > 0} autocomplete="off" onInput=${(event) => setPath(event.target.value)} />`}
          <//>
        </div>
        <${Problem} error=${action.error} />
        <div class="row"><button class="primary" disabled=${action.busy || !name.trim() || !(path.trim() || files.length)}>${text.imports.submit}</button></div>
      </form>
    </details>
  `;
}
