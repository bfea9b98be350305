// Follow the command line from a program: node events.mjs IN... OUT
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

const command = process.env.GDPO_UPSCALE ?? 'gdpo-upscale';
const child = spawn(command, [...process.argv.slice(2), '--json'], { stdio: ['ignore', 'pipe', 'pipe'] });
const messages = [];
createInterface({ input: child.stderr }).on('line', (line) => messages.push(line));
createInterface({ input: child.stdout }).on('line', (line) => {
  const event = JSON.parse(line);
  if (event.event === 'progress') console.log(`${Math.round(event.fraction * 100)}% ${event.input}`);
  if (event.event === 'picture') console.log(`${event.status}: ${event.error ?? event.output}`);
});
child.on('close', (code) => {
  if (code === 2) console.error(messages.at(-1)); // bad usage: one line says what is wrong
  process.exitCode = code;
});
