package locker

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
)

// A NotificationPayload is the value that a holder receives from its channel when it should stop.
type NotificationPayload struct {
	// ID is the ID of the lock whose newer claim has caused the notification. If the cause is
	// another one, it is the ID of the holder's own lock.
	ID uuid.UUID `json:"id"`
	// Message is the event of the newer claim, the reason that an operator gave, or the text of the
	// cause. It is meant for logs.
	Message string `json:"event"`
	// LockKey is the key of the lock. In JSON it is a number, as in the original library, so a
	// reader needs integers of 64 bits.
	LockKey int64 `json:"lockKey"`
}

// notifyChannel carries the notifications of all keys. (The original library uses one channel for
// each key, named by the decimal key.)
const notifyChannel = "env_lock_events"

// NOTIFY accepts payloads below 8,000 bytes. The rest of a message takes less than 1,700 of them,
// with numbers, IDs, the host and the labels at their longest.
const (
	maxPayload = 7999
	maxLabels  = 1024
	maxEvent   = maxPayload - 1700
)

// The kinds of message on the channel. A message without a kind comes from an operator: its text
// becomes the holder's notification.
const (
	kindClaim    = "claim"
	kindReleased = "released"
	kindCheck    = "check" // proves to the session itself that NOTIFY arrives
	kindManual   = ""
)

// The payloads that statements send, as formats for SQL's format(). The host and the process are
// those of the claim's sender.
var (
	payloadClaim = `{"kind":"` + kindClaim + `","lockKey":%s,"claim":%s,"id":"%s","event":%s,"host":` +
		strings.ReplaceAll(quoteJSON(hostName), "%", "%%") + `,"pid":` + strconv.Itoa(processID)
	payloadPlain = payloadClaim + `}`
	payloadFull  = payloadClaim + `,"labels":%s,"finish":%s}`
)

const payloadReleased = `{"kind":"` + kindReleased + `","lockKey":%s}`

// message is a payload of the channel. It is a hint: only speed depends on its arrival.
type message struct {
	Kind    string            `json:"kind,omitempty"`
	LockKey int64             `json:"lockKey"`
	ID      uuid.UUID         `json:"id"`
	Event   string            `json:"event"`
	Claim   int64             `json:"claim,omitempty"`
	Host    string            `json:"host,omitempty"`
	PID     int               `json:"pid,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Finish  bool              `json:"finish,omitempty"` // the claim lets the holder finish
}

// claimed returns the event for a message about a claim. The number of a claim is a time on the
// server's clock.
func (m *message) claimed() event {
	return event{kind: evClaimed, from: standing{m.Claim, m.ID}, finish: m.Finish, claim: &ClaimInfo{
		ID: m.ID, Event: m.Event, Labels: m.Labels, Host: m.Host, PID: m.PID, Since: time.UnixMicro(m.Claim)}}
}

func quoteJSON(text string) string {
	// Strings can always be encoded.
	b, _ := json.Marshal(text)
	return string(b)
}

// decodeMessage decodes a payload of the channel. Any role can send to the channel, so the payload
// may be anything. The key may be a string, because a client in JavaScript has no number for it.
func decodeMessage(payload string) (message, error) {
	var m message
	var strict struct {
		message
		LockKey *json.Number `json:"lockKey"`
	}
	if err := json.Unmarshal([]byte(payload), &strict); err != nil {
		return m, annotate(err, "locker: decode notification")
	}
	m = strict.message
	switch m.Kind {
	case kindClaim, kindReleased, kindManual:
		if strict.LockKey == nil {
			return m, errors.New("locker: decode notification: no lockKey")
		}
		key, err := strict.LockKey.Int64()
		if err != nil {
			return m, annotate(err, "locker: decode notification")
		}
		m.LockKey = key
	case kindCheck:
	default:
		return m, fmt.Errorf("locker: decode notification: unknown kind %q", m.Kind)
	}
	return m, nil
}

// cleanText makes text valid UTF-8 without NUL, so that a text column and a notification can hold
// it.
func cleanText(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// cleanEvent applies cleanText to an event, and truncates it between two runes so that it is short
// enough when it is quoted.
func cleanEvent(event string) string {
	event = cleanText(event)
	// A quoted byte takes six bytes at most.
	if len(event)*6+2 <= maxEvent {
		return event
	}
	size := 2
	for i, r := range event {
		size += quotedSize(r)
		if size > maxEvent {
			return event[:i]
		}
	}
	return event
}

// storable replaces by ? the characters of a text that a database with the given encoding may be
// unable to store. With most encodings these are all characters that are not ASCII.
func storable(text, encoding string) string {
	// SQL_ASCII accepts any bytes.
	if encoding == "UTF8" || encoding == "SQL_ASCII" {
		return text
	}
	western := encoding == "LATIN1" || encoding == "WIN1252"
	return strings.Map(func(r rune) rune {
		if r < 0x80 || western && r >= 0xA0 && r <= 0xFF {
			return r
		}
		return '?'
	}, text)
}

// quotedSize returns the largest number of bytes that a rune takes in a JSON string.
func quotedSize(r rune) int {
	switch {
	case r == '"', r == '\\':
		return 2
	case r < 0x20, r == 0x7f, r == '\u2028', r == '\u2029':
		return 6
	}
	return utf8.RuneLen(r)
}
