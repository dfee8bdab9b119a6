// The canonical state of a conversation over HTTP: what a client starts from.

import { ApiProblem } from "./api.js";
import { parseSeq } from "./cursor.js";

const PAGE_LIMIT = 1000;

/**
 * Read the whole timeline, page by page. Returns {version: BigInt, epoch: string|null, entities: Array}; a conversation
 * that does not exist yet is an empty one. Rejects with ApiProblem or NetworkFailure.
 */
export async function readSnapshot(api, convId, profile) {
  const entities = [];
  let first = null;
  let page = null;
  let after;
  do {
    page = await readPage(api, { conv_id: convId, profile, limit: PAGE_LIMIT, after_position: after });
    if (page === null) return { version: 0n, epoch: null, entities: [] };
    first ??= page;
    entities.push(...page.entities);
    after = page.entities.at(-1)?.position;
  } while (page.more && after !== undefined);
  // Pages are read one after another, so only the first one's version is true for all of them: what changed since is
  // replayed from there, and the versions of the entities sort out what is already known.
  return { version: parseSeq(first.version), epoch: first.epoch ?? null, entities };
}

async function readPage(api, query) {
  try {
    return (await api.get("api/timeline", query)).body;
  } catch (error) {
    if (error instanceof ApiProblem && error.status === 404) return null;
    throw error;
  }
}
