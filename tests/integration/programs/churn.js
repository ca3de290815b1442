// A server whose memory is churned: collected, given back to the kernel, taken again, and looked at.
//
// node churn.js SOCKET    serve HTTP: /health /digest /churn
"use strict";
const crypto = require("crypto");
const http = require("http");
const { Session } = require("inspector");

// The collection that also gives memory back, as under memory pressure.
const session = new Session();
session.connect();
const collect = () => new Promise((done) => session.post("HeapProfiler.collectGarbage", done));

// What is there from before the dump: buffers, objects, strings, a compiled function that runs hot.
const filled = (size, seed) => Buffer.alloc(size, crypto.createHash("sha256").update(String(seed)).digest());
const standing = {
  buffers: Array.from({ length: 24 }, (_, i) => filled(2 << 20, i)),
  objects: new Map(Array.from({ length: 50000 }, (_, i) => [`key ${i}`, { i, square: i * i, text: `value ${i}` }])),
};

function digest() {
  const sum = crypto.createHash("sha256");
  for (const buffer of standing.buffers) sum.update(buffer);
  for (const [key, value] of standing.objects) sum.update(key + JSON.stringify(value));
  return sum.digest("hex");
}

function requireZeros(array, what) {
  for (let i = 0; i < array.length; i++) if (array[i] !== 0) throw new Error(`${what} of ${array.length} is not zeros`);
}

async function churn() {
  const before = digest();
  let allocated = 0;
  for (let round = 0; round < 3; round++) {
    let kept = [];
    for (let i = 0; i < 10; i++) {
      for (const size of [64, 5000, 90000, 1 << 20]) {
        for (const [what, array] of [["a buffer", Buffer.alloc(size)], ["an array", new Float64Array(size >> 3)]]) {
          requireZeros(array, what);
          array.fill(i + 1);
          allocated += size;
          if (i % 3 === 0) kept.push([i + 1, array]);
        }
      }
      // Young objects and old ones, of many sizes, so that pages of the heap empty.
      kept.push([0, Array.from({ length: 500 }, (_, j) => ({ j, list: new Array((j % 50) + 1).fill(j) }))]);
    }
    for (const [value, array] of kept) {
      if (value && array.some((one) => one !== value)) throw new Error("an array changed by itself");
      if (!value && array.some(({ j, list }) => list.some((one) => one !== j))) throw new Error("an object changed");
    }
    kept = [];
    await collect();
  }
  const resizable = new ArrayBuffer(1 << 16, { maxByteLength: 1 << 24 });
  for (const size of [1 << 20, 1 << 12, 1 << 24]) {
    const from = Math.min(size, resizable.byteLength);
    resizable.resize(size);
    requireZeros(new Uint8Array(resizable).subarray(from), "the new part of a resized buffer");
    new Uint8Array(resizable).fill(7);
  }
  if (digest() !== before) throw new Error("what was there before changed");
  return `allocated ${allocated}`;
}

const pages = { "/health": () => "ok", "/digest": digest, "/churn": churn };

http
  .createServer(async (request, response) => {
    const page = pages[request.url];
    try {
      const text = page ? await page() : "no such page";
      response.writeHead(page ? 200 : 404, { Connection: "close" }).end(text);
    } catch (error) {
      response.statusCode = 500;
      response.end(String(error));
    }
  })
  .listen(process.argv[2]);
