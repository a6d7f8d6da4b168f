"""The scheduler alone, over random schedules: what must hold of pages, order and progress after every step."""

import collections

import numpy as np
import pytest

from ernie_jax.engine.batching import aligned
from ernie_jax.engine.pages import PagePool, extend_keys
from ernie_jax.engine.scheduler import PREFILL_ROWS, Scheduler, Task, take_chunks

PAGE = 4
IN_FLIGHT = 3


@pytest.fixture
def rng():
    """Give fresh schedules on every run; the seed is printed, and pytest shows it when a test fails."""
    seed = np.random.SeedSequence().entropy % 2**32
    print("numpy seed", seed)
    return np.random.default_rng(seed)


class Device:
    """Stand in for the devices and the engine: run plans, read tokens some steps later, and watch over pages.

    Every page remembers the tokens written to it; a plan is wrong if it writes where others read, or reads what was
    not written for it.
    """

    def __init__(self, groups=1, pages=24, slots=4, prefill=16, mixed=4, caching=True, alignment=1):
        self.pools = [PagePool(pages) for _ in range(groups)]
        self.options = {"slots": slots, "prefill_chunk": prefill, "mixed_chunk": mixed, "prefix_caching": caching}
        self.options |= {"alignment": alignment}
        self.scheduler = Scheduler(self.pools, PAGE, **self.options)
        self.slots, self.prefill, self.mixed = slots, prefill, mixed
        self.written = [[[None] * PAGE for _ in range(pages)] for _ in range(groups)]
        self.in_flight = collections.deque()
        self.tasks = []
        self.answers = {}
        self.finished = []

    def submit(self, prompt, most, answer, priority=0):
        """Add a request whose answer is known beforehand; it may stop before `most`."""
        task = Task(len(self.tasks), prompt, most, priority)
        self.tasks.append(task)
        self.answers[task.request] = answer
        self.scheduler.add(task)
        return task

    @property
    def busy(self):
        return bool(self.scheduler.waiting or self.scheduler.running or self.in_flight)

    def step(self):
        plan = self.scheduler.plan()
        self.check_plan(plan)
        if sampling := [part for part in (*plan.decode, *plan.chunks) if part.samples]:
            self.in_flight.append(sampling)
        self.check_pages()
        if len(self.in_flight) > IN_FLIGHT or (self.in_flight and not plan):
            self.read()
        self.check_pages()
        return plan

    def check_known(self):
        """Hold the keys of pages to what was written to them."""
        for group, pool in enumerate(self.pools):
            for page in pool._idle:
                assert None not in self.written[group][page]
            for task in self.scheduler.running:
                if task.group == group:
                    tokens, chain = [*task.prompt, *self.answers[task.request]], []
                    extend_keys(chain, tokens[: len(task.pages) * PAGE], PAGE)
                    for index, (page, key) in enumerate(zip(task.pages, chain, strict=False)):
                        if page in pool._keys:
                            assert pool._keys[page] == key
                            assert self.written[group][page] == tokens[index * PAGE : (index + 1) * PAGE]

    def reset(self):
        """Begin anew after a failure, as Engine.reset: whatever was written may be wrong."""
        dropped = [*self.scheduler.waiting, *self.scheduler.running]
        for task in dropped:
            self.scheduler.drop(task)
        for pool in self.pools:
            pool.forget()
            assert len(pool.free) == pool.size
        self.written = [[[None] * PAGE for _ in pages] for pages in self.written]
        self.in_flight.clear()
        return dropped

    def read(self):
        for part in self.in_flight.popleft():
            task, answer = part.task, self.answers[part.task.request]
            if task.finished:
                continue
            assert part.index == len(task.output)  # in order, none twice, none lost
            self.scheduler.read(task, answer[part.index])
            if len(task.output) == min(task.most, len(answer) - 5):  # surplus tokens lie behind a stop
                self.scheduler.drop(task)
                self.finished.append(task)

    def token(self, task, position):
        return [*task.prompt, *self.answers[task.request]][position]

    def check_plan(self, plan):
        tokens = collections.defaultdict(list)
        for part in plan.chunks:
            tokens[part.task.group].append(part.count)
            assert not part.decodes
        taken = sum(aligned(counts, self.options["alignment"]).sum() for counts in tokens.values())
        assert taken <= (self.mixed if plan.decode else self.prefill)
        assert all(count <= PREFILL_ROWS for count in collections.Counter(p.task.group for p in plan.chunks).values())
        everyone = [part.task for part in (*plan.decode, *plan.chunks)]
        assert len(set(map(id, everyone))) == len(everyone) <= self.slots
        decoding = [task for task in self.scheduler.running if task.computed > task.target]
        assert {id(part.task) for part in plan.decode} <= set(map(id, decoding))
        for part in (*plan.decode, *plan.chunks):
            task, written = part.task, self.written[part.task.group]
            assert task.slot >= 0 and len(task.pages) * PAGE >= part.start + part.count
            for position in range(part.start, part.start + part.count):
                page = task.pages[position // PAGE]
                assert self.pools[task.group]._users[page] == 1
                written[page][position % PAGE] = self.token(task, position)
        for part in (*plan.decode, *plan.chunks):  # after all writes, as no read may see another's
            task, written = part.task, self.written[part.task.group]
            seen = [written[task.pages[i // PAGE]][i % PAGE] for i in range(part.start + part.count)]
            assert seen == [self.token(task, i) for i in range(len(seen))]

    def check_pages(self):
        running = self.scheduler.running
        assert len(running) <= self.slots
        assert len({task.slot for task in running}) == len(running)
        for group, pool in enumerate(self.pools):
            members = [task for task in running if task.group == group]
            users = collections.Counter(page for task in members for page in task.pages)
            assert pool.sequences == len(members)
            assert [users[page] for page in range(pool.size)] == pool._users
            free, idle, used = set(pool.free), set(pool._idle), set(users)
            assert len(pool.free) == len(free)
            assert not free & idle and not free & used and not idle & used
            assert len(free) + len(idle) + len(used) == pool.size
            assert pool._pages == {key: page for page, key in pool._keys.items()}
            assert idle <= set(pool._keys) and not free & set(pool._keys)
            for task in members:
                assert len(task.pages) * PAGE >= task.computed
                assert len(set(task.pages)) == len(task.pages)
                for index, page in enumerate(task.pages):
                    if users[page] > 1:  # shared: full, known by the same tokens, and behind nobody's pen
                        assert pool._keys[page] == task.keys[index] and index < task.registered
                        assert (index + 1) * PAGE <= min(task.computed, task.known)
            if not self.options["prefix_caching"]:
                assert not pool._keys


def draw_request(rng, device, prompts):
    """Submit something that may share its beginning with an earlier prompt or continue an earlier answer."""
    room = device.pools[0].size * PAGE
    most = int(rng.integers(1, 20))
    kind = rng.random()
    if kind < 0.4 and prompts:
        old = prompts[rng.integers(len(prompts))]
        prompt = old[: rng.integers(1, len(old) + 1)] + rng.integers(0, 3, rng.integers(0, 9)).tolist()
    else:
        prompt = rng.integers(0, 50, rng.integers(1, room // 2)).tolist()
    prompt = prompt[: room - most] or [7]
    answer = rng.integers(0, 50, most if rng.random() < 0.5 else rng.integers(1, most + 1)).tolist()
    surplus = rng.integers(0, 50, 5).tolist()
    prompts.append(prompt)
    task = device.submit(prompt, most, answer + surplus, int(rng.integers(0, 3)))
    prompts.append((prompt + answer)[: room - 20] or [7])
    return task


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("groups", [1, 3])
def test_random_schedules(rng, groups, caching):
    preemptions = hits = 0
    for _ in range(40 // groups):
        device = Device(
            groups,
            pages=int(rng.integers(8, 40)),
            slots=groups * int(rng.integers(1, 9)),
            prefill=int(rng.integers(1, 40)),
            mixed=int(rng.integers(1, 10)),
            caching=caching,
            alignment=int(rng.choice([1, 8])),
        )
        prompts, cancelled = [], set()
        for _ in range(int(rng.integers(20, 120))):
            for _ in range(rng.poisson(0.4 * groups)):
                draw_request(rng, device, prompts)
            live = [task for task in device.tasks if not task.finished]
            if live and rng.random() < 0.05:
                task = live[rng.integers(len(live))]
                device.scheduler.drop(task)
                cancelled.add(task.request)
                device.check_pages()
            if rng.random() < 0.01:
                cancelled.update(task.request for task in device.reset())
                device.check_pages()
            device.step()
            device.check_known()
        steps = 0
        while device.busy:  # nobody starves
            device.step()
            steps += 1
            assert steps < 200 * len(device.tasks) + 100
        assert len(device.finished) + len(cancelled) == len(device.tasks)
        for task in device.finished:
            assert task.output == device.answers[task.request][: len(task.output)]
        for task in device.tasks:  # and nobody keeps a place
            assert task.finished and task.slot < 0 and not task.pages
        assert len(set(device.scheduler._free_slots)) == len(device.scheduler._free_slots) == device.slots
        assert all(pool.available == pool.size and not pool.sequences for pool in device.pools)
        assert device.scheduler.counters.generated_tokens == sum(len(task.output) for task in device.tasks)
        preemptions += device.scheduler.counters.preemptions
        hits += device.scheduler.counters.cached_tokens
    assert preemptions > 5  # some 55, within a factor of 1.5
    assert (hits > 100) == caching


def test_equal_calls_give_equal_plans(rng):
    """Several processes of a run must decide alike."""
    seed = int(rng.integers(1 << 30))
    logs = []
    for _ in range(2):
        again, device, prompts, log = np.random.default_rng(seed), Device(2, pages=12), [], []
        for _ in range(150):
            if again.random() < 0.5:
                draw_request(again, device, prompts)
            plan = device.step()
            log.append([(p.task.request, p.start, p.count, list(p.task.pages)) for p in (*plan.decode, *plan.chunks)])
        logs.append(log)
    assert logs[0] == logs[1]


def run_out(device):
    plans = []
    while device.busy:
        plans.append(device.step())
        assert len(plans) < 10000
    return plans


def test_a_long_prompt_does_not_stall_streams():
    device = Device(pages=100, prefill=64, mixed=8)
    stream = device.submit([1] * 10, 60, [2] * 65)
    device.step()
    device.submit([3] * 200, 1, [4] * 6)
    for _ in range(200 // 8):
        plan = device.step()
        assert [part.task for part in plan.decode] == [stream]
        assert sum(part.count for part in plan.chunks) == 8


def test_first_come_first_served_and_priority_before_that():
    device = Device(pages=100, slots=1)
    for request, priority in enumerate([1, 0, 1, 0, -3]):
        device.submit([request] * 3, 2, [9] * 7, priority)
    run_out(device)
    assert [task.request for task in device.finished] == [4, 1, 3, 0, 2]


def test_a_large_request_at_the_head_is_not_overtaken():
    device = Device(pages=20, slots=4, caching=False)
    device.submit([1] * 40, 8, [1] * 13)
    device.step()
    large = device.submit([2] * 60, 8, [2] * 13)
    small = device.submit([3] * 2, 2, [3] * 7)
    while large.slot < 0:
        assert small.slot < 0
        device.step()
    run_out(device)


def test_the_last_come_gives_up_its_pages_and_goes_on_first():
    device = Device(pages=12, slots=3, caching=False)
    first = device.submit([1] * 15, 28, [1] * 33)
    second = device.submit([2] * 15, 28, [2] * 33)
    third = device.submit([3] * 4, 2, [3] * 7)
    run_out(device)
    assert device.scheduler.counters.preemptions > 0
    assert [task.request for task in device.finished].index(first.request) < 2
    assert second.output == [2] * 28 and third.output == [3] * 2


def test_tables_change_rarely_while_pages_are_plenty():
    device = Device(pages=4000, slots=32, prefill=4000, mixed=4000)
    for request in range(32):
        device.submit([request] * (3 + request), 400, [5] * 405)
    before, changed = 0, 0
    for _ in range(420):
        plan = device.step()
        changed += bool(plan.decode) and not plan.chunks and device.scheduler.changes > before
        before = device.scheduler.changes
    assert len(device.finished) == 32 and 1 <= changed < 12


def test_a_conversation_reuses_its_turns():
    device = Device(pages=200, slots=2, prefill=32)
    prompt = list(range(10))
    for turn in range(5):
        answer = [100 + turn] * 9
        task = device.submit(list(prompt), 9, answer + [0] * 5)
        run_out(device)
        # All full pages but the one whose last token was sampled and never fed.
        assert task.cached == (0 if turn == 0 else (len(prompt) - 4) // PAGE * PAGE)
        prompt += [*answer, 7, 8, 9]


def test_a_prompt_that_is_cached_whole_computes_its_last_page():
    device = Device(pages=50)
    device.submit([1] * 16, 1, [2] * 6)
    run_out(device)
    task = device.submit([1] * 16, 1, [2] * 6)
    (plan, *_) = run_out(device)
    assert task.cached == 12 and [part.count for part in plan.chunks] == [4]


def test_sequences_go_where_their_prefix_is_unless_that_is_crowded():
    device = Device(groups=3, pages=200, slots=32)
    device.submit([1] * 20, 1, [2] * 6)
    run_out(device)
    tasks = [device.submit([1] * 20, 50, [2] * 55) for _ in range(12)]
    device.step()
    groups = collections.Counter(task.group for task in tasks)
    assert groups[0] == max(groups.values()) and sum(task.cached > 0 for task in tasks) >= 5
    assert len(groups) == 3


def test_the_end_of_a_chain_is_forgotten_before_its_beginning():
    pool, keys = PagePool(4), []
    extend_keys(keys, range(3 * PAGE), PAGE)
    pages = pool.take(3)
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    pool.release(pages)
    assert (pool.available, pool.idle) == (4, 3)
    pool.take(2)
    assert pool.find(keys) == pages[:2]
    pool.forget()
    assert (pool.find(keys), pool.available, pool.idle) == ([], 2, 0)


def test_keys_depend_on_all_tokens_before():
    chains = []
    for tokens in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7, 8]):
        chains.append([])
        extend_keys(chains[-1], tokens, PAGE)
    assert chains[0] == chains[1] and len(chains[0]) == 2
    assert not set(chains[0]) & set(chains[2])
    grown = chains[1][:1]
    extend_keys(grown, [5, 6, 7, 8], PAGE)
    assert grown == chains[1]


@pytest.mark.parametrize(
    ("waiting", "budget", "alignment", "expected"),
    [
        ([], 8, 1, []),
        ([20], 8, 1, [8]),
        ([3, 20], 8, 1, [3, 5]),
        ([7, 1, 1], 8, 1, [7, 1]),
        ([2] * 9, 64, 1, [2] * 8),
        ([3, 20], 8, 4, [3, 4]),
        ([7, 1, 1], 8, 4, [7]),
        ([6, 9], 10, 8, [6, 2]),
        ([3, 1, 9], 10, 8, [3, 1]),
    ],
)
def test_chunks(waiting, budget, alignment, expected):
    assert take_chunks(waiting, budget, 8, alignment) == expected
    assert aligned(expected, alignment).sum() <= budget
