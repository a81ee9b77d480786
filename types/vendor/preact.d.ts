export function h(type: unknown, props: unknown, ...children: unknown[]): unknown;
export function render(tree: unknown, place: Element | null): void;
