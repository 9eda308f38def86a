"""Every policy again, slowly and in float64, written from the papers and not from cpp/policies: what the tests compare with.

A layer is a dict as `Context.signals()` gives it: pos [n_head_kv, n], attn [n_head, n], sums [n_head_kv, n],
keys [n_head_kv, n, d], q_mean [n_head, d], q_cov [n_head, d, d], v_norm [n_head_kv, n], o_norm [n_head, n],
attn_rows [n_head, n_query, n], value_rows [n_head_kv, n, d], each only where the policy needs it; budget, what a head is to keep.
A class is a policy, its arguments are the parameters:

    oracle.snapkv(window=16).kept(layers, n_keep=[64] * 30)    # a layer: slots I32 [n_head_kv, n_keep], ascending

n_keep is what a head keeps on average; adakv's heads differ, a shorter one begins with -1s.

A score of NaN says that the slot is kept whatever its score, so a test must not look at it.
"""
import numpy as np


def attention(q, k, scale, q_pos, k_pos):
    """softmax(scale * Q K^T + causal mask): q [n_query, n_head, d], k [n_kv, n_head_kv, d], q_pos [n_query],
    k_pos [n_head_kv, n_kv] -> [n_head, n_query, n_kv]."""
    n_query, n_head, _ = q.shape
    n_kv, n_head_kv, _ = k.shape
    out = np.zeros((n_head, n_query, n_kv))
    for h in range(n_head):
        g = h // (n_head // n_head_kv)
        for i in range(n_query):
            x = scale * (k[:, g].astype(float) @ q[i, h].astype(float))
            x[k_pos[g] > q_pos[i]] = -np.inf
            x = np.exp(x - x.max())
            out[h, i] = x / x.sum()
    return out


def rotate(x, pos, base=10000.0, neox=False):
    """RoPE (2104.09864): x [n, n_head, d], pos [n] -> the same, pair i turned by pos * base^(-2i/d). Pairs are neighbours, or
    (neox) lie half a head apart."""
    d = x.shape[-1]
    first, second = (np.arange(d // 2), np.arange(d // 2) + d // 2) if neox else (np.arange(0, d, 2), np.arange(1, d, 2))
    turn = np.exp(1j * np.outer(pos, base ** (-np.arange(0, d, 2) / d)))[:, None]
    z = (x[..., first] + 1j * x[..., second]) * turn
    out = np.array(x, dtype=float)
    out[..., first], out[..., second] = z.real, z.imag
    return out


def expected_queries(q, begin, future, **rope):
    """2510.00636: queries before their rotation, [n, n_head, d] -> mean [n_head, d] and covariance [n_head, d, d], both turned by
    the mean rotation matrix of positions [begin, begin + future)."""
    n, _, d = q.shape
    at = np.arange(begin, begin + future)
    # column i of the matrix is what becomes of the unit vector i
    mean_rotation = np.stack([rotate(np.tile(np.eye(d)[i], (future, 1, 1)), at, **rope).mean(axis=0)[0] for i in range(d)], axis=1)
    mean = q.astype(float).mean(axis=0)
    centred = q - mean
    cov = np.einsum("nhi,nhj->hij", centred, centred) / n
    return mean @ mean_rotation.T, mean_rotation @ cov @ mean_rotation.T


def window_mean(a, newest=1.0):
    """[n_head, n_query, n_kv] -> [n_head, n_kv]: the mean over the queries, weighted 1 (oldest) to `newest`,
    linearly."""
    return np.average(a, axis=1, weights=np.linspace(1, newest, a.shape[1]))


def over_group(attn, n_head_kv):
    """[n_head, n] -> [n_head_kv, n]: the mean over the query heads that share a KV head."""
    n_head, n = attn.shape
    return attn.astype(float).reshape(n_head_kv, n_head // n_head_kv, n).mean(axis=1)


def best(score, slots, k):
    """The k of `slots` with the highest score; equal scores go to the older slot."""
    return sorted(slots, key=lambda j: (-score[j], j))[:k]


def pooled(row, kernel, how):
    """avg: zero padded, the padding counts (torch's avg_pool1d). max: padding never wins."""
    half = kernel // 2
    near = np.lib.stride_tricks.sliding_window_view(np.pad(row, half, constant_values=0 if how == "avg" else -np.inf), kernel)
    return near.sum(axis=1) / kernel if how == "avg" else near.max(axis=1)


class Policy:
    """What most methods share: every layer keeps `budget`, every head its own best tokens."""
    n_sink = 0

    def n_recent(self, n_keep):
        return 0

    def score(self, layer, il=0, n_layer=1):
        """[n_head_kv, n], higher is kept longer; None: this file does not say (a hash)."""
        return None

    def budgets(self, n, n_layer, budget):
        """What each layer keeps, before rounding to whole tokens."""
        return np.full(n_layer, float(budget))

    def scores_for(self, scores, il):
        """What layer il ranks by, where layers share a choice."""
        return scores[il]

    def keep(self, pos, score, n_keep, n_frozen=0, spans=(), prompt=True):
        """One layer: [n_head_kv, n_keep]."""
        return np.array([sorted(self.keep_head(row, n_keep, n_frozen)) for row in score], dtype=np.int32)

    def keep_head(self, row, n_keep, n_frozen):
        n = len(row)
        recent = self.n_recent(n_keep - n_frozen)
        always = {j for j in range(n) if j < n_frozen or j < self.n_sink or j >= n - recent}
        return always | set(best(row, set(range(n)) - always, n_keep - len(always)))

    def plan(self, pos, scores, n_keep, n_frozen=None, **how):
        """All layers, from scores and whole budgets."""
        n_frozen = n_frozen or [0] * len(pos)
        return [self.keep(pos[il], self.scores_for(scores, il), n_keep[il], n_frozen[il], **how) for il in range(len(pos))]

    def kept(self, layers, n_keep, **how):
        """All layers, from their signals. Scores are compared as F32: equal there is equal."""
        scores = [np.nan_to_num(self.score(x, il, len(layers))).astype(np.float32) for il, x in enumerate(layers)]
        return self.plan([x["pos"] for x in layers], scores, n_keep, **how)


def shared(policy, pos, scores, budget, over):
    """What a policy keeps where one ranking decides for several heads (cpp/policies/share.h): a layer [n_head_kv, n_keep], -1 first in a shorter head.

    pos, scores: a layer [n_head_kv, n_kv]. over: "layers" | "layer" | "all"."""
    n_layer, n_hkv = len(pos), len(pos[0])
    always = [[{int(j) for j in np.flatnonzero(row >= 0) if _is_always(policy, row, j, budget)} for row in layer] for layer in pos]
    rivals = sorted((-scores[il][h][j], j, il * n_hkv + h) for il in range(n_layer) for h in range(n_hkv)
                    for j in np.flatnonzero(pos[il][h] >= 0) if j not in always[il][h])
    n_heads = np.array([[len(head) for head in layer] for layer in always])
    if over != "layers":  # a head keeps something
        for empty in np.flatnonzero(n_heads.ravel() == 0):
            n_heads.ravel()[empty] = 1
            rivals.remove(next(x for x in rivals if x[2] == empty))
    groups = [range(n_layer)] if over != "layer" else [[il] for il in range(n_layer)]
    for layers in groups:
        mine = [head for _, _, head in rivals if head // n_hkv in layers]
        n_left = n_hkv * budget * len(layers) - n_heads[list(layers)].sum()
        for head in mine[:max(0, n_left)]:
            il, h = divmod(head, n_hkv)
            n_heads[il, h] += 1
    if over == "layers":
        n_keep = np.maximum(n_heads.sum(axis=1) // n_hkv, 1)
        while n_keep.sum() > n_layer * budget:  # those that would have had nothing
            for il in reversed(range(n_layer)):
                n_keep[il] -= n_keep[il] > 1 and n_keep.sum() > n_layer * budget
        room = [len(row[0]) for row in pos]
        while n_keep.sum() < min(n_layer * budget, sum(room)):
            for il in range(n_layer):
                n_keep[il] += n_keep[il] < room[il] and n_keep.sum() < n_layer * budget
        n_heads = np.tile(n_keep[:, None], (1, n_hkv))
    return [np.array([_head(policy, pos[il][h], scores[il][h], n_heads[il, h], n_heads[il].max()) for h in range(n_hkv)], dtype=np.int32)
            for il in range(n_layer)]


def weighted(policy, pos, scores, budget, weights):
    """What a policy keeps where each layer has its part of the budget by a weight; as shared()."""
    n_layer, room = len(pos), [layer.shape[1] for layer in pos]
    least = max([1] + [sum(bool(_is_always(policy, row, j, budget)) for j in np.flatnonzero(row >= 0)) for layer in pos for row in layer])
    ideal = [n_layer * budget * weight / sum(weights) for weight in weights]
    n_keep = [int(min(max(np.floor(x + 1e-6), least), n)) for x, n in zip(ideal, room)]
    while sum(n_keep) > n_layer * budget:
        for il in reversed(range(n_layer)):
            n_keep[il] -= n_keep[il] > least and sum(n_keep) > n_layer * budget
    while sum(n_keep) < min(n_layer * budget, sum(room)):
        for il in range(n_layer):
            n_keep[il] += n_keep[il] < room[il] and sum(n_keep) < n_layer * budget
    return [np.array([_head(policy, row, score, n, n) for row, score in zip(pos[il], scores[il])], dtype=np.int32) for il, n in enumerate(n_keep)]


def _is_always(policy, row, j, n_keep):
    first = int((row < 0).sum())
    return j < first + policy.n_sink or j >= len(row) - policy.n_recent(n_keep)


def _head(policy, row, score, n_keep, n_longest):
    held = [int(j) for j in np.flatnonzero(row >= 0)]
    always = {j for j in held if _is_always(policy, row, j, n_keep)}
    return [-1] * (n_longest - n_keep) + sorted(always | set(best(score, set(held) - always, n_keep - len(always))))


class full(Policy):
    def score(self, layer, il=0, n_layer=1):
        return np.full(layer["pos"].shape, np.nan)

    def budgets(self, n, n_layer, budget):
        return np.full(n_layer, float(n))


class random(Policy):
    """A hash of the position: tests look at what any hash must do."""
    def __init__(self, seed=0):
        pass


class random_head(Policy):
    """2609.03430's control: a hash of layer, head and position."""
    def __init__(self, seed=0, recent=1):
        self.recent = recent

    def n_recent(self, n_keep):
        return min(n_keep, self.recent)


class streaming_llm(Policy):
    """2309.17453: the first `sinks`, then the newest. No score."""
    def __init__(self, sinks=4):
        self.n_sink = sinks

    def n_recent(self, n_keep):
        return n_keep - self.n_sink

    def score(self, layer, il=0, n_layer=1):
        return np.full(layer["pos"].shape, np.nan)


class h2o(Policy):
    """2306.14048: half of what is kept (rounded down) is the newest tokens, half the heaviest by attention summed so
    far."""
    def __init__(self, recent=0.5):
        self.recent = recent

    def n_recent(self, n_keep):
        return int(self.recent * n_keep)

    def score(self, layer, il=0, n_layer=1):
        return layer["sums"].astype(float)


class tova(Policy):
    """2401.06104: attention of the last query, mean over all heads. kvpress 0.5.5 protects the last token."""
    def n_recent(self, n_keep):
        return 1

    def score(self, layer, il=0, n_layer=1):
        mean = layer["attn"].astype(float).mean(axis=0)
        mean[-1] = np.nan
        return np.tile(mean, (len(layer["pos"]), 1))


class knorm(Policy):
    """2406.11430: a key with a small norm draws attention."""
    def score(self, layer, il=0, n_layer=1):
        return -np.sqrt((layer["keys"].astype(float) ** 2).sum(axis=-1))


class keydiff(Policy):
    """2504.15364: the keys least like the mean direction of all keys of the head; ours, the first tokens and a share of
    the budget for the most recent ones."""
    def __init__(self, sinks=0, recent=0):
        self.n_sink, self.recent = sinks, recent

    def n_recent(self, n_keep):
        return int(self.recent * max(n_keep - self.n_sink, 0))

    def score(self, layer, il=0, n_layer=1):
        unit = layer["keys"].astype(float)
        unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
        anchor = unit.mean(axis=1, keepdims=True)
        return -(unit * anchor).sum(axis=-1) / np.linalg.norm(anchor, axis=-1)


class snapkv(Policy):
    """2404.14469 as in kvpress 0.5.5: mean over the window, pooled along the keys before it, mean over the group."""
    def __init__(self, window=32, kernel=5, pool="avg"):
        self.window, self.kernel, self.pool = window, kernel, pool

    def n_recent(self, n_keep):
        return self.window

    def score(self, layer, il=0, n_layer=1):
        attn = layer["attn"].astype(float)
        out = np.full(attn.shape, np.nan)
        for h, row in enumerate(attn):
            before = row[:len(row) - self.window]
            out[h, :len(before)] = pooled(before, self.kernel, self.pool)
        return over_group(out, len(layer["pos"]))


class pyramidkv(snapkv):
    """2406.02069: SnapKV's score, budgets that fall linearly with depth. Flatter where the first layer has too few
    tokens."""
    def __init__(self, window=32, kernel=5, pool="avg", beta=20):
        super().__init__(window, kernel, pool)
        self.beta = beta

    def budgets(self, n, n_layer, budget):
        w, b = self.window, budget - self.window
        low = b / self.beta
        high = 2 * b - low
        if high >= n - w:
            high = n - w
            low = 2 * b - high
        return np.array([w + high - il * (high - low) / max(1, n_layer - 1) for il in range(n_layer)])


class adakv(snapkv):
    """2407.11550: SnapKV's score. Of the budget beside the window every head has alpha for its own best, rounded down; the rest of
    all heads' budgets goes to the best scores of all heads, equal ones to the older slot, then to the lower head."""
    def __init__(self, window=32, kernel=5, pool="avg", alpha=0.2):
        super().__init__(window, kernel, pool)
        self.alpha = alpha

    def keep(self, pos, score, n_keep, n_frozen=0, spans=(), prompt=True):
        before = range(score.shape[1] - self.window)
        heads = [set(best(row, before, int(self.alpha * (n_keep - self.window)))) for row in score]
        others = [(-row[j], j, h) for h, row in enumerate(score) for j in before if j not in heads[h]]
        for _, j, h in sorted(others)[:len(score) * (n_keep - self.window) - sum(map(len, heads))]:
            heads[h].add(j)
        lists = [sorted(head) + list(range(before.stop, score.shape[1])) for head in heads]
        return np.array([[-1] * (max(map(len, lists)) - len(x)) + x for x in lists], dtype=np.int32)


class pyramidinfer(Policy):
    """2405.12532: attention of the newest queries, the newest weighted 1.2; one set per layer. Schedule and share of
    recent tokens as the header of cpp/policies/pyramidinfer.cpp states them, for the paper leaves them open."""
    def __init__(self, window=256, sinks=4, recent=0.2, decay=0.9):
        self.n_sink, self.recent, self.decay = sinks, recent, decay

    def n_recent(self, n_keep):
        return max(1, int(self.recent * (n_keep - self.n_sink)))

    def score(self, layer, il=0, n_layer=1):
        return np.tile(layer["attn"].astype(float).mean(axis=0), (len(layer["pos"]), 1))

    def budgets(self, n, n_layer, budget):
        depth = np.arange(n_layer - 1)
        step = self.decay + (1 - self.decay) * (1 + np.cos(np.pi * depth / n_layer)) / 2
        share = np.concatenate([[1], np.cumprod(step)])
        ideal = budget * share / share.mean()
        while (ideal > n + 1e-9).any():  # what a layer has no tokens for goes evenly to those that have
            excess = (ideal - n).clip(0).sum()
            ideal = np.minimum(ideal, n)
            ideal[ideal < n] += excess / (ideal < n).sum()
        return ideal


class chunkkv(Policy):
    """2502.00299: a chunk's score is the mean over its tokens of the attention summed over the heads. Whole chunks as long
    as they fit, then the next chunk's best tokens, so the budget is met exactly. `reuse` layers share the first's choice."""
    def __init__(self, chunk=10, window=32, pool="none", kernel=5, reuse=1):
        self.chunk, self.window, self.reuse = chunk, window, reuse
        self.token_score = snapkv(window, 1 if pool == "none" else kernel, "avg" if pool == "none" else pool).score

    def n_recent(self, n_keep):
        return self.window

    def score(self, layer, il=0, n_layer=1):
        return self.token_score(layer)

    def scores_for(self, scores, il):
        return scores[il - il % self.reuse]

    def keep(self, pos, score, n_keep, n_frozen=0, spans=(), prompt=True):
        total = score.astype(float).sum(axis=0)
        n = len(total)
        before = n - self.window
        chunks = [range(b, min(b + self.chunk, before)) for b in range(0, before, self.chunk)]
        chunks.sort(key=lambda c: (-np.mean(total[c]), c[0]))
        out = set(range(before, n))
        for c in chunks:
            out |= set(best(total, c, n_keep - len(out)))
        return np.array([sorted(out)] * len(score), dtype=np.int32)


class finch(Policy):
    """2408.00167: what the question's tokens give each cell, mean over them and the group; pooled along the keys."""
    def __init__(self, window=64, recent=32, kernel=31, pool="max"):
        self.recent, self.kernel, self.pool = recent, kernel, pool

    def n_recent(self, n_keep):
        return min(n_keep, self.recent)

    def score(self, layer, il=0, n_layer=1):
        probed = layer.get("probed")
        score = over_group(layer["attn"], len(layer["pos"])) if probed is None else probed.astype(float)
        return score if self.pool == "none" else np.array([pooled(row, self.kernel, self.pool) for row in score])


class kvzip(Policy):
    """2505.23416: the most that any token of the repetition gives each cell. The most of them is the probe's own."""
    def __init__(self, chunk=2048, softmax="chunk", plus=0, window=256, sinks=4, recent=32):
        self.n_sink, self.recent = sinks, recent

    def n_recent(self, n_keep):
        return min(n_keep, self.recent)

    def score(self, layer, il=0, n_layer=1):
        return layer["probed"].astype(float)


class expected_attention(Policy):
    """2510.00636: the mean of exp(q.k) over Gaussian queries, as a share among the tokens that are not sinks, times the
    norm of the value."""
    def __init__(self, window=128, future=512, sinks=4, recent=32, epsilon=0):
        self.n_sink, self.recent, self.epsilon = sinks, recent, epsilon

    def n_recent(self, n_keep):
        return min(n_keep, self.recent)

    def score(self, layer, il=0, n_layer=1):
        mean, cov, keys, norm = (layer[x].astype(float) for x in ("q_mean", "q_cov", "keys", "v_norm"))
        share = np.full((len(mean), keys.shape[1]), np.nan)
        for h in range(len(mean)):
            k = keys[h // (len(mean) // len(keys)), self.n_sink:]
            x = k @ mean[h] + np.einsum("ni,ij,nj->n", k, cov[h], k) / 2
            x = np.exp(x - x.max())
            share[h, self.n_sink:] = x / x.sum()
        return (over_group(share, len(keys)) + self.epsilon) * norm


BEST = float(np.finfo(np.float32).max)


class critical:
    """2502.03805 around another policy's score: half of the budget to the best by it, the others by (score + 1e-4) *
    |W_O v|."""
    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def score(self, layer, il=0, n_layer=1):
        plain = np.asarray(self.policy.score(layer, il, n_layer), float)
        known = np.where(np.isnan(plain), np.nanmax(plain, initial=0), plain)  # the window has the greatest score
        out = (known + 1e-4) * over_group(layer["o_norm"], len(plain))
        for h, row in enumerate(known.astype(np.float32)):
            out[h, best(row, range(len(row)), layer["budget"] // 2)] = BEST
        return np.where(np.isinf(plain), plain, out)

    plan, kept = Policy.plan, Policy.kept


def criticalkv(**params):
    return critical(snapkv(**params))


class defensive(snapkv):
    """2510.13334: the worst case over the group and the window, at least the mean, by the values' share among the
    heads."""
    def __init__(self, window=32, kernel=5, pool="avg", mass=0.9):
        super().__init__(window, kernel, pool)
        self.mass = mass

    def score(self, layer, il=0, n_layer=1):
        rows, norm = layer["attn_rows"].astype(float), over_group(layer["o_norm"], len(layer["pos"]))
        n_hkv, n_kv = layer["pos"].shape
        n = max(n_kv - self.window, 0)
        before = rows[:, :, :n]
        smooth = np.array([[pooled(query, self.kernel, self.pool) for query in head] for head in before])
        smooth *= before.sum(axis=2, keepdims=True) / smooth.sum(axis=2, keepdims=True)
        worst = smooth.reshape(n_hkv, -1, n).max(axis=1)
        worst = np.maximum(worst, worst.mean(axis=1, keepdims=True))
        out = worst * (norm / norm.sum(axis=0))[:, :n]
        first, window = before.reshape(n_hkv, -1, n).mean(axis=1), 1 - before.sum(axis=2).mean()
        top = out.max(initial=0)
        for h in range(n_hkv):
            order = np.argsort(-first[h], kind="stable")
            n_first = int((np.cumsum(first[h][order]) < (self.mass - window) * first[h].sum()).sum())
            out[h, order[:max(0, min(n_first, layer["budget"] - self.window))]] = top
        return np.concatenate([out, np.full((n_hkv, n_kv - n), top)], axis=1)


class dropkv(Policy):
    """|o - o without j|^2, summed over the window and the group: computed by leaving j out, not by the formula."""
    def __init__(self, window=32):
        self.window = window

    def n_recent(self, n_keep):
        return min(n_keep, self.window)

    def score(self, layer, il=0, n_layer=1):
        rows, values = layer["attn_rows"].astype(float), layer["value_rows"].astype(float)
        n_hkv, n, d = values.shape
        out = np.zeros((n_hkv, n))
        for h, head in enumerate(rows):
            v = values[h // (len(rows) // n_hkv)]
            for p in head:
                o = p @ v
                left = np.maximum(1 - p, 1e-6)[:, None]
                without = np.where(1 - p[:, None] > 1e-6, (o - p[:, None] * v) / left, o - p[:, None] / left * (v - o))  # [n, d]
                out[h // (len(rows) // n_hkv)] += ((o - without) ** 2).sum(axis=1)
        return out


def hash_slot(seed, il, h, pos):
    """cpp/policies/select.h: 24 bits of splitmix64, in [0, 1)."""
    def mix(x):
        x = (x + 0x9e3779b97f4a7c15) & (2**64 - 1)
        x = ((x ^ x >> 30) * 0xbf58476d1ce4e5b9) & (2**64 - 1)
        x = ((x ^ x >> 27) * 0x94d049bb133111eb) & (2**64 - 1)
        return x ^ x >> 31
    return (mix(mix(seed) ^ (il << 48 ^ h << 36 ^ int(pos))) >> 40) / 2**24


class vase(Policy):
    """2606.03928: a quarter to the widest values, the rest drawn without replacement, in proportion to attention."""
    def __init__(self, window=32, sinks=4, range=0.25, seed=0):
        self.window, self.n_sink, self.range, self.seed = window, sinks, range, seed

    def n_recent(self, n_keep):
        return max(0, min(n_keep - self.n_sink, self.window))

    def score(self, layer, il=0, n_layer=1):
        attn = over_group(layer["attn"], len(layer["pos"])) + 1e-9
        u = np.array([[hash_slot(self.seed, il, h, p) for p in row] for h, row in enumerate(layer["pos"])])
        out = np.log(1 - u) / attn
        width = layer["value_rows"].max(axis=2) - layer["value_rows"].min(axis=2)
        for h, row in enumerate(width):
            out[h, best(row, range(len(row)), int(self.range * layer["budget"]))] = BEST
        return out


class rkv(Policy):
    """2505.24133: lambda * pooled attention - (1 - lambda) * softmax of the mean cosine; of a key's likes the newest
    counts as 0."""
    def __init__(self, window=8, kernel=7, pool="max", **weight):
        self.window, self.kernel, self.pool, self.weight = window, kernel, pool, weight.get("lambda", 0.1)

    def n_recent(self, n_keep):
        return min(n_keep, self.window)

    def score(self, layer, il=0, n_layer=1):
        n_hkv, n = layer["pos"].shape
        attn = layer["attn"].astype(float).reshape(n_hkv, -1, n).max(axis=1)
        out = np.zeros((n_hkv, n))
        for h, keys in enumerate(layer["keys"].astype(float)):
            unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            cosine = unit @ unit.T
            np.fill_diagonal(cosine, 0)
            for i in np.flatnonzero((cosine > 0.5).any(axis=1)):
                cosine[i, np.flatnonzero(cosine[i] > 0.5)[-1]] = 0
            x = np.exp(cosine.mean(axis=0))
            out[h] = self.weight * pooled(attn[h], self.kernel, self.pool) - (1 - self.weight) * x / x.sum()
        return out


class shotkv(Policy):
    """2502.01941: whole shots in descending mean attention per token, summed over the heads; the prompt is then frozen and
    generated tokens compete among themselves. fit: a shot that does not fit is skipped for the next that does, or ends
    the search (trim). Either way the best shot not taken gets what is left, for its best tokens."""
    def __init__(self, window=32, sinks=4, recent=32, fit="skip", queries="window", layers="own"):
        self.window, self.n_sink, self.recent, self.fit = window, sinks, recent, fit
        self.queries, self.layers = queries, layers

    def n_recent(self, n_keep):
        return self.window

    def score(self, layer, il=0, n_layer=1):
        if self.queries == "window":
            return over_group(layer["attn"], len(layer["pos"]))
        return layer["sums"].astype(float) / (layer["pos"].max() - layer["pos"] + 1)  # by the queries that could see it

    def scores_for(self, scores, il):
        return np.sum(scores, axis=0) if self.layers == "shared" else scores[il]

    def keep(self, pos, score, n_keep, n_frozen=0, spans=(), prompt=True):
        total = score.astype(float).sum(axis=0)
        n = len(total)
        out = set(range(n_frozen)) | set(range(n - min(self.recent, n_keep - n_frozen), n))
        out = self.keep_shots(pos[0], total, n_keep, spans) if prompt else out
        out |= set(best(total, set(range(n)) - out, n_keep - len(out)))
        return np.array([sorted(out)] * len(score), dtype=np.int32)

    def keep_shots(self, pos, total, n_keep, spans):
        n = len(total)
        shots = [[j for j in range(n) if begin <= pos[j] < end] for begin, end in spans]
        out = set(range(n)) - {j for s in shots for j in s}
        out |= set(range(self.n_sink)) | set(range(n - self.window, n))
        shots = [[j for j in s if j not in out] for s in shots]
        shots = sorted((s for s in shots if s), key=lambda s: (-np.mean(total[s]), s[0]))
        not_taken = []
        for s in shots:
            if len(s) <= n_keep - len(out) and not (not_taken and self.fit == "trim"):
                out |= set(s)
            else:
                not_taken.append(s)
        for s in not_taken[:1]:
            out |= set(best(total, s, n_keep - len(out)))
        return out


class random_shot(shotkv):
    """A hash of the shot: as `random`."""
    def __init__(self, seed=0, **shots):
        super().__init__(**shots)

    def score(self, layer, il=0, n_layer=1):
        return None


POLICIES = {c.__name__: c for c in (full, random, random_head, streaming_llm, h2o, tova, knorm, keydiff, snapkv, pyramidkv, criticalkv, defensive, dropkv, adakv,
                                    pyramidinfer, chunkkv, finch, kvzip, expected_attention, shotkv, random_shot, vase, rkv)}
