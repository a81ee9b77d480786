declare class uPlot {
  constructor(options: object, data: unknown[], place: Element);
  ctx: CanvasRenderingContext2D;
  bbox: {left: number; top: number; width: number; height: number};
  setData(data: unknown[]): void;
  setSize(size: {width: number; height: number}): void;
  redraw(rebuild: boolean): void;
  valToPos(value: number, scale: string, canvas: boolean): number;
  destroy(): void;
}
export default uPlot;
