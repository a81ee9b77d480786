export interface Signal<T> {
  value: T;
}
export function signal<T>(initial: T): Signal<T>;
export function computed<T>(compute: () => T): {readonly value: T};
export function effect(run: () => void): () => void;
