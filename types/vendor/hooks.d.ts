export function useEffect(effect: () => void | (() => void), of?: readonly unknown[]): void;
/** What begins as null holds what the server says, or an element of the page. */
export function useRef(initial: null): {current: any};
export function useRef<T>(initial: T): {current: T};
export function useState(initial: null): [any, (next: any) => void];
export function useState<T>(initial: T | (() => T)): [T, (next: T | ((was: T) => T)) => void];
