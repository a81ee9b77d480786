type Bound = (parts: TemplateStringsArray, ...values: unknown[]) => unknown;
declare const htm: {bind(create: unknown): Bound};
export default htm;
