// A server whose memory is churned: collected, given back to the kernel, taken again, and looked at.
//
//	churn SOCKET    serve HTTP: /health /digest /churn
package main

import (
	"bufio"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
)

// What is there from before the dump: large and small objects, a map, all from a seed.
type held struct {
	large [][]byte
	small map[uint64][]uint64
}

var standing held

func fill(block []byte, seed uint64) {
	for i := range block {
		seed = seed*6364136223846793005 + 1442695040888963407
		block[i] = byte(seed>>56) | 1
	}
}

func prepare() {
	standing.small = map[uint64][]uint64{}
	for i := uint64(0); i < 16; i++ {
		block := make([]byte, 3<<20)
		fill(block, i)
		standing.large = append(standing.large, block)
	}
	for i := uint64(0); i < 50000; i++ {
		standing.small[i] = []uint64{i, i * i, ^i}
	}
}

func digest() string {
	sum := fnv.New64a()
	for _, block := range standing.large {
		sum.Write(block)
	}
	for i := uint64(0); i < uint64(len(standing.small)); i++ {
		fmt.Fprint(sum, standing.small[i])
	}
	return fmt.Sprintf("%016x", sum.Sum64())
}

func zeros(block []byte) bool {
	for _, one := range block {
		if one != 0 {
			return false
		}
	}
	return true
}

type node struct {
	next    *node
	payload [13]uint64
}

// One goroutine's part: new memory of all sizes must be zeros, also where old memory was given back.
func churnOne(seed uint64, trouble chan<- string) {
	var kept [][]byte
	for i := 0; i < 10; i++ {
		for size := 32; size <= 4<<20; size *= 4 {
			block := make([]byte, size+i)
			if !zeros(block) {
				trouble <- fmt.Sprintf("a new slice of %d bytes is not zeros", len(block))
				return
			}
			fill(block, seed+uint64(i))
			if i%8 == 0 {
				kept = append(kept, block)
			}
		}
		var list *node
		for j := 0; j < 2000; j++ {
			list = &node{next: list}
			if list.payload != ([13]uint64{}) {
				trouble <- "a new object is not zeros"
				return
			}
			list.payload[j%13] = seed + 1
		}
		if i%5 == 4 {
			kept = nil
			debug.FreeOSMemory()
		}
	}
}

func churn() (string, bool) {
	trouble := make(chan string, 64)
	before := digest()
	var all sync.WaitGroup
	for i := 0; i < 4; i++ {
		all.Add(1)
		go func(seed uint64) { defer all.Done(); churnOne(seed, trouble) }(uint64(i))
	}
	all.Wait()
	debug.FreeOSMemory()
	if len(trouble) > 0 {
		return <-trouble, false
	}
	if digest() != before {
		return "what was there before changed", false
	}
	var now runtime.MemStats
	runtime.ReadMemStats(&now)
	return fmt.Sprintf("released %d allocated %d collections %d", now.HeapReleased, now.TotalAlloc, now.NumGC), true
}

func answer(peer net.Conn) {
	defer peer.Close()
	reader := bufio.NewReader(peer)
	request, _ := reader.ReadString('\n')
	for line := request; strings.TrimSpace(line) != ""; {
		line, _ = reader.ReadString('\n')
	}
	text, status := "ok", 200
	switch path := strings.Fields(request + " / /")[1]; path {
	case "/health":
	case "/digest":
		text = digest()
	case "/churn":
		var right bool
		if text, right = churn(); !right {
			status = 500
		}
	default:
		text, status = "no such page", 404
	}
	fmt.Fprintf(peer, "HTTP/1.1 %d .\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(text), text)
}

func main() {
	prepare()
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		if peer, err := listener.Accept(); err == nil {
			go answer(peer)
		}
	}
}
