/** Packs files into an archive that tar reads, without reading them. */

const BLOCK = 512;

/** files: File objects. The archive as a File of this name. */
export function tar(files, name) {
  const parts = [...files].flatMap((file) => [header(file.name, file.size), file, new Uint8Array(padding(file.size))]);
  return new File([...parts, new Uint8Array(2 * BLOCK)], name, {type: 'application/x-tar'});
}

const padding = (size) => (BLOCK - (size % BLOCK)) % BLOCK;

/** The header of a plain file in the ustar format. */
function header(name, size) {
  const block = new Uint8Array(BLOCK);
  const write = (at, text) => block.set(new TextEncoder().encode(text), at);
  const octal = (value, digits) => value.toString(8).padStart(digits, '0');
  write(0, name.slice(0, 99));
  write(100, `${octal(0o644, 7)}\0${octal(0, 7)}\0${octal(0, 7)}\0`);
  write(124, `${octal(size, 11)}\0${octal(0, 11)}\0`);
  write(148, ' '.repeat(8)); // the checksum counts as spaces
  write(156, '0'); // a plain file
  write(257, 'ustar\0');
  write(263, '00');
  const sum = block.reduce((total, byte) => total + byte, 0);
  write(148, `${octal(sum, 6)}\0 `);
  return block;
}
