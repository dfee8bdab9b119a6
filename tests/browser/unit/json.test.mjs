import assert from "node:assert/strict";
import { test } from "node:test";
import { Api } from "../../../src/transports/ui/api.js";
import { beginning, showValue } from "../../../src/transports/ui/dom.js";
import { LongInteger, parseJson, writeJson } from "../../../src/transports/ui/json.js";
import { EntityStore } from "../../../src/transports/ui/store.js";

for (const digits of ["9007199254740993", "2512292042121000001", "18446744073709551615", "-9223372036854775808"]) {
  test(`${digits} keeps its digits wherever it stands`, () => {
    for (const around of ["N", "[1,N]", '{"a":N}', '{"a": {"b" :\n[ N,N ]}, "s": "1234567890123456789"}', '["\\\\",N,"\\""]']) {
      const text = around.replaceAll("N", digits);
      const value = parseJson(text);
      assert.equal(writeJson(value), JSON.stringify(JSON.parse(around.replaceAll("N", '"N"'))).replaceAll('"N"', digits));
      assert.match(showValue(value), new RegExp(`(^|[^0-9])${digits}($|[^0-9])`));
    }
    const { n } = parseJson(`{"n":${digits}}`);
    assert.ok(n instanceof LongInteger);
    assert.equal(`${n}`, digits);
    assert.equal(n - 0, Number(digits));
  });
}

test("what a number can hold stays a number, and a text a text", () => {
  for (const text of [
    "9007199254740991", "[-9007199254740991,1.2345678901234567,12345678901234567e2,0.0000000000000000001,1e30]",
    '{"seq":"1795942656425000000","a":"[9007199254740993]","b":": 9007199254740993 "}',
    '{"9007199254740993":1,"a, 9007199254740993":[]}', '"\\\\"', '{"__proto__":{"a":9007199254740991}}',
  ]) {
    assert.deepEqual(parseJson(text), JSON.parse(text));
    assert.equal(writeJson(parseJson(text)), JSON.stringify(JSON.parse(text)));
  }
});

test("what is no JSON is refused, long numbers or not", () => {
  for (const text of ["", "{", "01234567890123456789", "[1234567890123456789", "12345678901234567890x", "-", "1234567890123456789."]) {
    assert.throws(() => parseJson(text), SyntaxError);
  }
});

test("a long text costs its length once, whatever is in it", () => {
  for (const piece of ["\\\\", '\\"', "a", "😀", "[1234567890123456789,"]) {
    const text = `{"n":1234567890123456789,"text":"${piece.repeat(300_000)}"}`;
    assert.equal(writeJson(parseJson(text)).length, JSON.stringify(JSON.parse(text)).length);
  }
});

test("what is shown of a tool call is what the tool gets", () => {
  const store = new EntityStore();
  const { event } = parseJson(`{"event":{"type":"tool.approval_requested","id":"t","seq":"5","prev":"0",
    "data":{"name":"pay","input":{"amount":2512292042121000001}}}}`);
  assert.ok(store.applyEvent(event));
  assert.equal(showValue(store.get("t").props.input), '{\n  "amount": 2512292042121000001\n}');
  store.mergeState(parseJson(`{"id":"t","kind":"tool_call","version":"6","position":"5","createdAtMs":1,"updatedAtMs":1,
    "props":{"name":"pay","input":{"amount":2512292042121000003},"inputText":18446744073709551615}}`));
  assert.equal(showValue(store.get("t").props.input), '{\n  "amount": 2512292042121000003\n}');
  assert.equal(store.get("t").text.toString(), "18446744073709551615");
});

test("an answer over HTTP keeps them, too", async () => {
  const fetch = async () => new Response('{"entities":[{"props":{"n":2512292042121000001}}]}');
  const { body } = await new Api("http://broker.test/", { fetch }).get("api/timeline");
  assert.equal(String(body.entities[0].props.n), "2512292042121000001");
});

test("a beginning ends with a whole character", () => {
  const family = "👨\u200d👩\u200d👧";
  for (const whole of ["é", "e\u0301", "हिन्दी".slice(0, 2), "😀", family, "🇩🇪", "각".normalize("NFD")]) {
    const text = `ab${whole}cd`;
    for (let count = 0; count <= text.length; count += 1) {
      const kept = beginning(text, count);
      assert.ok(kept.length <= count);
      assert.ok(["", "a", "ab", `ab${whole}`, `ab${whole}c`, text].includes(kept), JSON.stringify(kept));
    }
  }
  assert.equal(beginning("x".repeat(500), 300).length, 300);
  assert.equal(beginning("a" + "\u0301".repeat(2000), 1000).length, 1000); // no reader's character: only no half pair
  assert.equal(beginning("x" + "😀".repeat(1000), 1000).length, 999);
});
