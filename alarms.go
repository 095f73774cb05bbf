package locker

import (
	"container/heap"
	"sync"
	"time"
)

// alarms calls expire when a lock's deadline has come. All locks of a provider share
// one timer, and what is set later than it fires does not touch it: a cycle that
// ends in time sets none.
type alarms struct {
	mu    sync.Mutex // guards everything below, and the locks' alarm and queued; taken after a lock's mu
	queue alarmQueue
	timer *time.Timer
	fires time.Time // when the timer does; zero if it is not set
}

func (a *alarms) set(l *lock, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.alarm = at
	if l.queued > 0 {
		heap.Fix(&a.queue, l.queued-1)
	} else {
		heap.Push(&a.queue, l)
	}
	a.wakeLocked()
}

func (a *alarms) drop(l *lock) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l.queued > 0 {
		heap.Remove(&a.queue, l.queued-1)
	}
}

// stop ends the timer, unless a lock needs it. What is set afterwards starts it again.
func (a *alarms) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil && len(a.queue) == 0 {
		a.timer.Stop()
		a.fires = time.Time{}
	}
}

// wakeLocked sees to it that the timer fires in time for the first alarm.
func (a *alarms) wakeLocked() {
	if len(a.queue) == 0 {
		return
	}
	first := a.queue[0].alarm
	if !a.fires.IsZero() && !first.Before(a.fires) {
		return
	}
	a.fires = first
	if a.timer == nil {
		a.timer = time.AfterFunc(time.Until(first), a.fire)
	} else {
		a.timer.Reset(time.Until(first))
	}
}

func (a *alarms) fire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fires = time.Time{}
	for now := time.Now(); len(a.queue) > 0 && !a.queue[0].alarm.After(now); {
		go heap.Pop(&a.queue).(*lock).expire() // ends by itself; it may call an observer
	}
	a.wakeLocked()
}

// alarmQueue is a heap by alarm.
type alarmQueue []*lock

func (q alarmQueue) Len() int           { return len(q) }
func (q alarmQueue) Less(i, j int) bool { return q[i].alarm.Before(q[j].alarm) }

func (q alarmQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].queued, q[j].queued = i+1, j+1
}

func (q *alarmQueue) Push(l any) {
	*q = append(*q, l.(*lock))
	l.(*lock).queued = len(*q)
}

func (q *alarmQueue) Pop() any {
	last := len(*q) - 1
	l := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	l.queued = 0
	return l
}
