export const marked: {parse(source: string, options: {gfm: boolean; breaks: boolean; async: false}): string};
