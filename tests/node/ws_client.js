'use strict';
// A WebSocket client of the ws package: node ws_client.js URL '{"deflate": true, "protocols": []}'.
// Prints what it saw as one line of JSON.
const crypto = require('crypto');
const WebSocket = require('ws');

const [url, options] = [process.argv[2], JSON.parse(process.argv[3] || '{}')];
const ws = new WebSocket(url, options.protocols || [], {
  perMessageDeflate: Boolean(options.deflate),
  maxPayload: 64 * 1024 * 1024,
  headers: { 'X-From': 'node', ...(options.headers || {}) },
});
const result = { echoed: [] };

function end(more) {
  process.stdout.write(JSON.stringify({ ...result, ...more }), () => process.exit(0));
}

const messages = [
  'text', '', 'žluťoučký kůň', Buffer.from([0, 255, 128]), Buffer.alloc(0), 'x'.repeat(70000),
  crypto.randomBytes(1 << 20), crypto.randomBytes(1 << 19).toString('hex'),
];

ws.on('unexpected-response', (request, response) => {
  let body = '';
  response.on('data', (piece) => { body += piece; });
  response.on('end', () => end({ status: response.statusCode, headers: response.headers, body }));
});
ws.on('error', (error) => end({ error: error.message }));
ws.on('upgrade', (response) => { result.headers = response.headers; });
ws.on('open', () => {
  result.extensions = ws.extensions;
  result.protocol = ws.protocol;
  for (const message of messages) ws.send(message);
  ws.ping('from the client');
});
ws.on('pong', (payload) => { result.pong = payload.toString(); });
ws.on('ping', (payload) => { result.ping = payload.toString(); });
ws.on('message', (data, binary) => {
  const count = result.echoed.length;
  if (count < messages.length) {
    const sent = messages[count];
    result.echoed.push(binary === Buffer.isBuffer(sent) && data.equals(Buffer.from(sent)));
    if (result.echoed.length === messages.length) ws.send('ping');
    return;
  }
  result.answer = data.toString();
  if (options.close) ws.close(options.close, 'by the client');
  else ws.send(`close ${options.closed || 1000}`);
});
ws.on('close', (code, reason) => end({ closed: [code, reason.toString()] }));
