// Joins the player to the server of `dreamer4-nb play`. An answer is one binary message: the length of its header
// (four bytes, little-endian), the header {answer, sizes} as JSON, and the pictures of these sizes.
import { play } from "./player.js";

const address = new URL("socket", location.href);
address.protocol = address.protocol.replace("http", "ws");
const socket = new WebSocket(address);
socket.binaryType = "arraybuffer";
const channel = { send: (message) => socket.send(JSON.stringify(message)) };

socket.onmessage = ({ data }) => {
  const length = new DataView(data).getUint32(0, true);
  const { answer, sizes } = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let start = 4 + length;
  const pictures = sizes.map((size) => {
    start += size;
    return new Uint8Array(data, start - size, size);
  });
  channel.onmessage(answer, pictures);
};
socket.onopen = () => play(document.querySelector("main"), channel, document);
socket.onclose = () => channel.onclose?.();
