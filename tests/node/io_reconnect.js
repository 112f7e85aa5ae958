'use strict';
// A Socket.IO client that loses its worker: node io_reconnect.js URL '["polling"]'; prints the pid of its worker at
// each connection, and why it was disconnected, as lines; ends at the second connection.
const { io } = require('socket.io-client');

const [, , url, transports] = process.argv;
const socket = io(url, {
  transports: JSON.parse(transports), timeout: 60000, forceNew: true, reconnectionDelay: 50, randomizationFactor: 0,
});
let connections = 0;

socket.on('connect', () => socket.emit('whoami', (pid) => {
  process.stdout.write(`${pid}\n`);
  connections += 1;
  if (connections === 2) process.exit(0);
}));
socket.on('connect_error', (error) => process.stdout.write(`refused: ${error.message}\n`));
socket.on('disconnect', (reason) => process.stdout.write(`${reason}\n`));
