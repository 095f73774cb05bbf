package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
)

// sender sends deliveries like GitHub: recorded ones, either unchanged or with the number, the
// branch, the head commit and the time of another pull request.
type sender struct {
	secret   string
	recorded map[string][]byte // by action
	client   http.Client
}

func newSender() (*sender, error) {
	// The module's folder is looked up, so that the demo can be started from anywhere in it.
	module, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	s := &sender{secret: rand.Text(), recorded: make(map[string][]byte), client: http.Client{Timeout: 5 * time.Second}}
	for _, action := range []string{"opened", "synchronize", "closed"} {
		file := filepath.Join(strings.TrimSpace(string(module)), "testdata", "webhooks", "pull_request."+action+".json")
		if s.recorded[action], err = os.ReadFile(file); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// delivery is one webhook delivery, ready to be sent.
type delivery struct {
	id   string
	repo string
	pr   uint
	head string
	page string // of the commit
	body []byte
}

// prepare returns a delivery about a pull request that GitHub has changed just now. An action
// without a recorded delivery uses that of another action.
func (s *sender) prepare(action string, pr uint, branch, head string) (delivery, error) {
	// The payload is not a struct, so that it keeps everything else that GitHub sends.
	var payload map[string]any
	recorded, ok := s.recorded[action]
	if !ok {
		recorded = s.recorded["synchronize"]
	}
	numbers := json.NewDecoder(bytes.NewReader(recorded))
	numbers.UseNumber()
	if err := numbers.Decode(&payload); err != nil {
		return delivery{}, fmt.Errorf("recorded delivery %q: %w", action, err)
	}
	pull, _ := payload["pull_request"].(map[string]any)
	headOfPull, _ := pull["head"].(map[string]any)
	if headOfPull == nil {
		return delivery{}, fmt.Errorf("recorded delivery %q has no head", action)
	}
	payload["action"], payload["number"], pull["number"] = action, pr, pr
	headOfPull["ref"], headOfPull["sha"] = branch, head
	pull["html_url"] = fmt.Sprintf("https://github.com/Codertocat/Hello-World/pull/%d", pr)
	// The time is cut to the second, like GitHub's.
	pull["updated_at"] = time.Now().UTC().Format(time.RFC3339)
	if _, ok := payload["after"]; ok {
		payload["after"] = head
	}
	body, err := json.Marshal(payload)
	if err != nil {
		return delivery{}, err
	}
	return newDelivery(body)
}

// asRecorded returns a recorded delivery, byte for byte.
func (s *sender) asRecorded(action string) (delivery, error) { return newDelivery(s.recorded[action]) }

// newDelivery gives a payload an id of the same kind as GitHub's: a UUID that contains the time.
func newDelivery(body []byte) (delivery, error) {
	var payload struct {
		Number      uint `json:"number"`
		PullRequest struct {
			URL  string `json:"html_url"`
			Head struct {
				SHA string `json:"sha"`
			} `json:"head"`
		} `json:"pull_request"`
		Repository struct {
			FullName string `json:"full_name"`
		} `json:"repository"`
	}
	if err := json.Unmarshal(body, &payload); err != nil {
		return delivery{}, err
	}
	id, err := uuid.NewUUID()
	return delivery{
		id: id.String(), repo: payload.Repository.FullName, pr: payload.Number, head: payload.PullRequest.Head.SHA,
		page: payload.PullRequest.URL + "/commits/" + payload.PullRequest.Head.SHA, body: body,
	}, err
}

// post sends a signed delivery, and returns once the service has accepted it.
func (s *sender) post(ctx context.Context, url string, d delivery) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/webhook", bytes.NewReader(d.body))
	if err != nil {
		return err
	}
	signature := hmac.New(sha256.New, []byte(s.secret))
	signature.Write(d.body)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", "pull_request")
	r.Header.Set("X-GitHub-Delivery", d.id)
	r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(signature.Sum(nil)))
	res, err := s.client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusAccepted {
		return fmt.Errorf("delivery %s: %s", d.id, res.Status)
	}
	return nil
}

// holders returns the locks from a service's address for operators.
func (s *sender) holders(ctx context.Context, url string) ([]locker.LockStatus, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/locks", nil)
	if err != nil {
		return nil, err
	}
	res, err := s.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET /locks: %s", res.Status)
	}
	var holders []locker.LockStatus
	return holders, json.NewDecoder(res.Body).Decode(&holders)
}

// randomCommit returns a random hash that looks like that of a commit.
func randomCommit() string {
	hash := make([]byte, 20)
	// Read never fails.
	_, _ = rand.Read(hash)
	return hex.EncodeToString(hash)
}
