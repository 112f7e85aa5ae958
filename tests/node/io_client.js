'use strict';
// A Socket.IO client: node io_client.js URL PATH '["polling", "websocket"]'; prints what it saw as JSON.
const crypto = require('crypto');
const { io } = require('socket.io-client');

const [, , url, path, transports] = process.argv;
const socket = io(url, {
  path, transports: JSON.parse(transports), reconnection: false, timeout: 60000, forceNew: true,
});
const result = { echoed: [] };

function end(more) {
  process.stdout.write(JSON.stringify({ ...result, ...more }), () => process.exit(0));
}
function same(one, other) {
  if (Buffer.isBuffer(one)) return one.equals(Buffer.from(other));
  return JSON.stringify(one) === JSON.stringify(other);
}
const messages = [
  'text', '', { nested: ['žluť', 3, null] }, Buffer.from([0, 255, 128]), crypto.randomBytes(1 << 20),
  crypto.randomBytes(1 << 19).toString('hex'),
];

socket.on('connect_error', (error) => end({ error: `${error.message} ${error.description || ''}` }));
socket.on('echoed', (data) => {
  result.echoed.push(same(messages[result.echoed.length], data));
  if (result.echoed.length < messages.length) socket.emit('echo', messages[result.echoed.length]);
  else finish();
});
socket.on('told', (data) => { result.told = data; });
socket.on('disconnect', (reason) => end({ reason }));

function finish() {
  socket.emit('all', 'news');
  const ask = () => socket.emit('ask', 'x', (reply) => {
    // the server knows of an upgrade a moment later
    if (JSON.parse(transports).includes('websocket') && reply.transport !== 'websocket') {
      return setTimeout(ask, 20);
    }
    result.reply = reply;
    result.transport = socket.io.engine.transport.name;
    return socket.emit('leave');
  });
  ask();
}
socket.on('connect', () => socket.emit('echo', messages[0]));
