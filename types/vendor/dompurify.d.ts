declare const purify: {
  addHook(name: string, hook: (node: Element) => void): void;
  sanitize(html: string, options: object): string;
};
export default purify;
