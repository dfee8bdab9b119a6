// As much of a document as the page's modules need to build one in Node. `work` counts what was put into it.

export const work = { nodes: 0, chars: 0 };

class FakeNode {
  parentNode = null;

  remove() {
    if (this.parentNode === null) return;
    const siblings = this.parentNode.childNodes;
    // Nearly always the last one is meant: look from the end, as a browser does not have to look at all.
    siblings.splice(siblings.lastIndexOf(this), 1);
    this.parentNode = null;
  }
}

class FakeText extends FakeNode {
  nodeType = 3;

  constructor(text) {
    super();
    this.textContent = text;
    work.chars += text.length;
  }
}

class FakeElement extends FakeNode {
  nodeType = 1;
  childNodes = [];
  attributes = {};
  dataset = {};

  constructor(tag) {
    super();
    this.localName = tag;
    if (tag === "") this.nodeType = 11;
  }

  append(...nodes) {
    for (const given of nodes) {
      const node = given instanceof FakeNode ? given : new FakeText(String(given));
      work.nodes += 1;
      if (node.nodeType === 11) {
        const children = node.childNodes;
        node.childNodes = [];
        for (const child of children) this.#take(child);
      } else {
        node.remove();
        this.#take(node);
      }
    }
  }

  #take(node) {
    node.parentNode = this;
    // What browsers look at again with each piece: all of a text whose direction they have to find, all numbered items.
    for (let up = this; up !== null; up = up.parentNode) if (up.attributes.dir === "auto") work.nodes += up.childNodes.length;
    if (node.attributes?.value !== undefined) work.nodes += this.childNodes.length;
    this.childNodes.push(node);
  }

  replaceChildren(...nodes) {
    for (const node of this.childNodes) node.parentNode = null;
    this.childNodes = [];
    this.append(...nodes);
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  removeAttribute(name) {
    delete this.attributes[name];
  }

  addEventListener() {}

  get children() {
    return this.childNodes.filter((node) => node.nodeType === 1);
  }

  get lastChild() {
    return this.childNodes.at(-1) ?? null;
  }

  get lastElementChild() {
    return this.childNodes.findLast((node) => node.nodeType === 1) ?? null;
  }

  get textContent() {
    return this.childNodes.map((node) => node.textContent).join("");
  }

  set textContent(text) {
    this.replaceChildren(text);
  }
}

/** Put the stand-ins where the page's modules look for a document. */
export function installDocument() {
  globalThis.document = {
    createElement: (tag) => new FakeElement(tag),
    createDocumentFragment: () => new FakeElement(""),
  };
  if (globalThis.navigator === undefined) globalThis.navigator = {};
  return globalThis.document;
}

/** Every element below `root`, in order. */
export function* elementsOf(root) {
  for (const child of root.children) {
    yield child;
    yield* elementsOf(child);
  }
}

/** How deep elements are nested in `root`, without recursion. */
export function depthOf(root) {
  let depth = 0;
  let level = root.children;
  while (level.length > 0) {
    depth += 1;
    level = level.flatMap((one) => one.children);
  }
  return depth;
}
