// Serves on the socket that it was handed (LISTEN_FDS, from descriptor 3 on), and opens none itself.
const http = require('http');

if (process.env.LISTEN_PID !== String(process.pid) || process.env.LISTEN_FDS !== '1') {
  console.error(`not my sockets: ${process.env.LISTEN_PID} ${process.env.LISTEN_FDS}`);
  process.exit(2);
}
const server = http.createServer((request, response) => response.end(String(process.pid)));
server.listen({ fd: 3 }, () => console.log(`node listens on port ${server.address().port}`));
