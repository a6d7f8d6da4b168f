// The server's API: the model's card, and answers as streams of chunks.

const base = new URL(".", document.baseURI);
const BROKEN = "The connection broke off before the answer was complete.";

// What went wrong, in a sentence; `code` is the server's, or null.
export class ApiError extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }

  get asksForKey() {
    return this.code === "missing_api_key" || this.code === "invalid_api_key";
  }
}

// Return the card of the one model; throws ApiError.
export async function fetchModel(key) {
  const response = await request("v1/models", key, {});
  return (await response.json()).data[0];
}

// Yield the chunks of an answer; throws ApiError, or what `signal` is aborted with.
export async function* streamChat(body, key, signal) {
  const headers = { "content-type": "application/json" };
  const response = await request("v1/chat/completions", key, {
    method: "POST", headers, signal, body: JSON.stringify(body),
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new ApiError(BROKEN);
}

async function request(path, key, options) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, base), { ...options, headers });
  } catch (error) {
    options.signal?.throwIfAborted();
    throw new ApiError("The server can’t be reached; see whether it runs, then try again.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  try {
    const { message, code } = (await response.json()).error;
    return new ApiError(message, code);
  } catch {
    return new ApiError(`The server answered with status ${response.status} and no explanation.`);
  }
}

// Yield the data of server-sent events.
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) data.push(text.slice(5).replace(/^ /, ""));
        else if (text === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    signal.throwIfAborted();
    throw error instanceof TypeError ? new ApiError(BROKEN) : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
