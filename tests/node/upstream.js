'use strict';
// Upstreams of Node in one process, on the port given: http, ws (below /ws) and socket.io (below /io).
const crypto = require('crypto');
const http = require('http');
const { Server: SocketIO } = require('socket.io');
const { WebSocketServer } = require('ws');

let aborted = 0;
let connections = 0;
const closed = []; // [code, reason] of each WebSocket, in the order of their ends

function describe(request, body) {
  return JSON.stringify({
    method: request.method,
    url: request.url,
    version: request.httpVersion,
    fields: request.rawHeaders,
    length: body.length,
    sha256: crypto.createHash('sha256').update(body).digest('hex'),
    trailers: request.rawTrailers,
    connection: request.socket.number,
  });
}

function whole(request, done) {
  const pieces = [];
  request.on('data', (piece) => pieces.push(piece));
  request.on('end', () => done(Buffer.concat(pieces)));
}

const routes = {
  '/': (request, response) => whole(request, (body) => {
    response.setHeader('Content-Type', 'application/json');
    response.end(describe(request, body));
  }),
  '/pieces': (request, response) => { // chunked, of known content
    for (let i = 0; i < 1000; i++) response.write(`piece ${i}\n`);
    response.end();
  },
  '/trailers': (request, response) => {
    response.writeHead(200, { Trailer: 'X-Sum' });
    response.write('body');
    response.addTrailers({ 'X-Sum': '42' });
    response.end();
  },
  '/hints': (request, response) => {
    response.writeEarlyHints({ link: '</style.css>; rel=preload' }, () => response.end('after the hints'));
  },
  '/nothing': (request, response) => { response.writeHead(204); response.end(); },
  '/unmodified': (request, response) => { response.writeHead(304, { ETag: '"one"' }); response.end(); },
  '/cookies': (request, response) => {
    response.setHeader('Set-Cookie', ['a=1; Path=/', 'b=2; Expires=Thu, 01 Jan 2032 00:00:00 GMT']);
    response.end('cookies');
  },
  '/old': (request, response) => { // ends with its connection
    response.shouldKeepAlive = false;
    response.useChunkedEncodingByDefault = false;
    response.removeHeader('Transfer-Encoding');
    response.write('until ');
    response.end('the end');
  },
  '/duplex': (request, response) => { // answers each piece when it comes
    response.writeHead(200, { 'Content-Type': 'text/event-stream' });
    response.flushHeaders();
    request.on('data', (piece) => response.write(`data: ${piece.length}\n\n`));
    request.on('end', () => response.end('data: end\n\n'));
  },
  '/forever': (request, response) => { // until the client goes
    response.write('first\n');
    response.on('close', () => { aborted += 1; });
  },
  '/early': (request, response) => { // an answer before the body was read
    response.writeHead(413, { 'Content-Length': 3, Connection: 'close' });
    response.end('big');
  },
  '/dies': (request, response) => {
    response.writeHead(200, { 'Content-Length': 1000 });
    response.write('only this', () => request.socket.destroy());
  },
  '/slow-head': (request, response) => { // a head long before its body
    response.flushHeaders();
    pending.push(response);
  },
  '/finish': (request, response) => {
    const count = pending.length;
    for (const one of pending.splice(0)) one.end('finished');
    response.end(String(count));
  },
  '/state': (request, response) => response.end(JSON.stringify({ aborted, connections, closed })),
};
const pending = [];

function answer(request, response) {
  const route = routes[request.url.split('?')[0]];
  if (route) return route(request, response);
  return routes['/'](request, response);
}

const server = http.createServer(answer);
server.keepAliveTimeout = 0; // no end of its own to idle connections
server.on('connection', (socket) => { socket.number = ++connections; });
server.on('checkContinue', (request, response) => {
  if (request.url === '/unwelcome') {
    response.writeHead(417, { Connection: 'close' });
    return response.end('no');
  }
  response.writeContinue();
  return answer(request, response);
});

const wss = new WebSocketServer({
  noServer: true,
  maxPayload: 64 * 1024 * 1024,
  perMessageDeflate: { threshold: 0 },
  handleProtocols: (offered) => (offered.has('second.example') ? 'second.example' : false),
});
wss.on('connection', (ws, request) => {
  ws.on('message', (data, binary) => {
    const text = binary ? '' : data.toString();
    if (text.startsWith('close ')) return ws.close(Number(text.split(' ')[1]), 'as asked');
    if (text === 'info') return ws.send(JSON.stringify({ path: request.url, headers: request.rawHeaders }));
    if (text === 'terminate') return ws.terminate();
    if (text === 'ping') {
      ws.once('pong', (payload) => ws.send(`pong ${payload}`));
      return ws.ping('from the server');
    }
    return ws.send(data, { binary });
  });
  ws.on('close', (code, reason) => closed.push([code, reason.toString()]));
  ws.on('error', () => {});
});

const io = new SocketIO(server, {
  path: '/io/',
  maxHttpBufferSize: 16 * 1024 * 1024,
  cors: { origin: '*' },
  destroyUpgrade: false,
  perMessageDeflate: { threshold: 0 },
});
io.on('connection', (socket) => {
  socket.on('echo', (data) => socket.emit('echoed', data));
  socket.on('ask', (data, reply) => reply({ transport: socket.conn.transport.name, data }));
  socket.on('all', (data) => io.emit('told', data));
  socket.on('leave', () => socket.disconnect(true));
});

server.on('upgrade', (request, socket, head) => {
  const path = request.url.split('?')[0];
  socket.on('error', () => {});
  if (path.startsWith('/io/')) return undefined; // socket.io's own
  if (path === '/ws/denied') {
    return socket.end('HTTP/1.1 401 Unauthorized\r\nX-Reason: who are you\r\nContent-Length: 7\r\n' +
      'Connection: close\r\n\r\nnot you');
  }
  if ((request.headers.upgrade || '').toLowerCase() !== 'websocket') {
    socket.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello');
    if (head.length) socket.write(head);
    return socket.pipe(socket);
  }
  return wss.handleUpgrade(request, socket, head, (ws) => wss.emit('connection', ws, request));
});

server.listen(Number(process.argv[2]), '127.0.0.1');
